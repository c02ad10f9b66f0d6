"""Run a service with uvicorn until it is stopped."""

from __future__ import annotations

import logging
import signal
import socket

import uvicorn

from nmt_moe.checks import check_whole
from nmt_moe.serving.app import make_app
from nmt_moe.serving.observing import LOGGER, log_as_json
from nmt_moe.serving.service import Service

logger = logging.getLogger(LOGGER)


def serve(service: Service, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, and then finish the open requests.

    Args:
        service: The service to run.
        host: Address to listen on.
        port: Port to listen on; 0 for any free port. The log names it.

    Raises:
        ValueError: if `port` is out of range.
        OSError: if the server cannot listen on the address.
    """
    check_whole("port", port, 0, 65535)
    log_as_json()
    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}/"
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(service.settings.time_limit) + 1,
        lifespan="on",
        ws="none",
    )
    server = uvicorn.Server(config)

    def stop(*_: object) -> None:
        server.should_exit = True

    # uvicorn handles these signals only while it runs, and raises them again when it stops. An
    # earlier signal must not be lost, and a requested stop is not an error.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    names = {
        model.folder: [*model.sources, "->", *model.targets] for model in service.models.opened
    }
    fields = {"address": address, "models": {f: " ".join(n) for f, n in names.items()}}
    logger.info("serving", extra={"fields": fields})
    server.run(sockets=[listening])
    logger.info("ended")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Name TCP explicitly, because asyncio otherwise keeps Nagle's delay of 40 ms per response.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)  # before the log announces the address
    except OSError as error:
        listening.close()
        raise OSError(
            f"cannot listen on {host}, port {port}: {error.strerror}. Choose another `--host` or "
            "`--port`."
        ) from None
    return listening
