"""Servers on free ports of the loopback interface, in this process or in a separate one."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from nmt_moe.serving import Models, ServerSettings, Service, make_app

# This time-out applies to every wait. It is long because a machine may be slow under load.
PATIENCE = 120.0


def wait_for(condition: Callable[[], object], expected: object) -> None:
    """Wait until a function returns the expected value."""
    end = time.monotonic() + PATIENCE
    while condition() != expected:
        assert time.monotonic() < end, condition()
        time.sleep(0.01)


class LiveServer:
    """A service behind real sockets.

    Attributes:
        service: The service.
        url: The address, without a slash at the end.
        port: The port of the loopback interface.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        # Name TCP explicitly, as the command does. Otherwise Nagle's algorithm delays each answer
        # by 40 ms.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(make_app(service), log_config=None, access_log=False, ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))

    def __enter__(self) -> "LiveServer":
        self._thread.start()
        end = time.monotonic() + PATIENCE
        while not self._server.started:
            assert self._thread.is_alive()
            assert time.monotonic() < end
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._socket.close()

    def post(self, path: str, content: Any, **headers: str) -> httpx.Response:
        """Send JSON."""
        return httpx.post(self.url + path, json=content, headers=headers, timeout=PATIENCE)

    def translate(self, q: Any, **fields: Any) -> Any:
        """Send texts to LibreTranslate's API, check for status 200, and return the answer."""
        answer = self.post("/translate", {"q": q, "source": "aa", "target": "bb", **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()


def make_service(*folders: Path | str, is_batching: bool = True, **settings: Any) -> Service:
    """Open bundles as the command does."""
    models = Models.open([str(folder) for folder in folders])
    return Service(models, ServerSettings(**settings), 1, is_batching)


@contextmanager
def served(*arguments: object) -> Iterator[tuple[subprocess.Popen, str, list[dict[str, Any]]]]:
    """Run `nmt-moe serve` on a free port; yield the process, its address and its growing log."""
    command = [sys.executable, "-m", "nmt_moe.cli", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log: list[dict[str, Any]] = []
    assert process.stderr is not None
    stderr = process.stderr

    def read() -> None:
        log.extend(map(json.loads, stderr))

    try:
        assert stderr.readline().startswith("loading ")
        log.append(json.loads(stderr.readline()))
        reader = threading.Thread(target=read)
        reader.start()
        yield process, log[0]["address"].removesuffix("/"), log
    finally:
        process.kill()
        process.wait()
        reader.join()


def raw(port: int, content: bytes) -> bytes:
    """Send bytes over a socket; return all bytes received until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
        connection.sendall(content)
        return receive(connection)


def receive(connection: socket.socket) -> bytes:
    """Return all bytes received until the other side closes."""
    connection.settimeout(PATIENCE)
    return b"".join(iter(lambda: connection.recv(65536), b""))
