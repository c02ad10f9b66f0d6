"""Start programs quickly, as forks of a process that has already imported torch and fairseq.

Importing fairseq takes seconds, most of the duration of a test that runs small commands.
`python()` returns a Python in a folder with the programs of this environment. The programs that
tests start most often are clients. They send their arguments, environment variables, working
folder and open files to a server, which forks a process that becomes the program. As usual, each
program imports the project's own modules itself.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import json
import logging
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import torch

# These are the modules that nmt_moe, recipes and fairseq's commands import, except those that set
# up logging.
IMPORTED_BEFORE = (
    *("click", "num2words", "pooch", "sacrebleu.significance", "sacremoses", "sentencepiece"),
    *("fairseq.checkpoint_utils", "fairseq.data.data_utils_fast", "fairseq.options"),
    *("fairseq.tasks", "fairseq.trainer", "tqdm"),
)

CLIENT = """\
#!{python} -IS
import json, os, signal, socket, sys
if sys.argv[1:2] == ["-u"]:  # as torchrun starts its ranks
    del sys.argv[1]
name, first = os.path.basename(sys.argv[0]), "".join(sys.argv[1:2])
if name == "python" and first != "-m" and not first.endswith(".py"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = {{"arguments": sys.argv, "folder": os.getcwd(), "variables": dict(os.environ)}}
    content = json.dumps(request).encode()
    socket.send_fds(server, [len(content).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(content)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: server.send(bytes([number])))
    status = server.recv(1)
sys.exit(status[0] if status else 1)
"""


@functools.cache
def python() -> Path:
    """Return a Python that runs programs quickly, and start its server if necessary."""
    folder = tempfile.TemporaryDirectory(prefix="programs-")
    address = str(Path(folder.name, "server"))
    client = CLIENT.format(python=sys.executable, address=address)
    for program in Path(sys.executable).parent.iterdir():
        own = Path(folder.name, program.name)
        if program.name in ("python", "sacrebleu") or program.name.startswith("fairseq-"):
            own.write_text(client)
            own.chmod(0o755)
        elif program.is_file():
            own.symlink_to(program)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.programs", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
    )
    assert server.stdout.readline(), "the server of programs did not start"

    @atexit.register
    def stop() -> None:
        server.communicate()  # the server exits when its standard input is closed
        folder.cleanup()

    return Path(folder.name, "python")


class Server:
    """A server that forks a process for each request, and sends its exit status to the client."""

    def __init__(self, address: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(64)
        self.clients: dict[int, socket.socket] = {}  # by process id
        # These sockets wake `select` when a process ends.
        self.wakeup, self.waker = socket.socketpair()
        self.waker.setblocking(False)
        signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> list[str]:
        """Serve requests, and return only in forks, with the arguments of their programs."""
        while True:
            sources = [sys.stdin, self.listener, self.wakeup, *self.clients.values()]
            ready, _, _ = select.select(sources, [], [])
            if sys.stdin in ready:
                os._exit(0)  # the tests have ended
            if self.wakeup in ready:
                self.wakeup.recv(4096)
                self.report_ended()
            for process, client in self.clients.items():
                if client in ready:
                    number = client.recv(1)  # a signal to pass on, or nothing if the client died
                    os.kill(process, number[0] if number else signal.SIGKILL)
            if self.listener in ready:
                client, _ = self.listener.accept()
                length, files, _, _ = socket.recv_fds(client, 4, 3)
                with client.makefile("rb") as stream:
                    request = json.loads(stream.read(int.from_bytes(length, "big")))
                process = os.fork()
                if process == 0:
                    client.close()
                    self.leave_for(request, files)
                    return request["arguments"]
                self.clients[process] = client
                for file in files:
                    os.close(file)

    def report_ended(self) -> None:
        """Send the exit status of each ended process to its client."""
        while self.clients:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                return
            status = os.waitstatus_to_exitcode(status)
            with self.clients.pop(process) as client, contextlib.suppress(BrokenPipeError):
                client.sendall(bytes([status if status >= 0 else 128 - status]))

    def leave_for(self, request: dict[str, Any], files: list[int]) -> None:
        """Turn this copy of the server into a process with the client's environment."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for connection in (self.listener, self.wakeup, self.waker, *self.clients.values()):
            connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["variables"])


def become(arguments: list[str]) -> None:
    """Run a program as if Python had started it."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(":"))
    name = Path(arguments[0]).name
    if name != "python":
        sys.argv = arguments
        (script,) = importlib.metadata.entry_points(group="console_scripts", name=name)
        sys.exit(script.load()())
    if arguments[1] == "-m":
        sys.argv = arguments[2:]
        sys.path.insert(0, os.getcwd())
        runpy._run_module_as_main(arguments[2])  # `python -m` calls this function
    else:
        sys.argv = arguments[1:]
        sys.path.insert(0, str(Path(arguments[1]).parent))
        runpy.run_path(arguments[1], run_name="__main__")


def end(error: BaseException | None) -> NoReturn:
    """End like Python, but let the kernel free the memory, which takes Python half a second."""
    status = 0 if error is None else 1
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(address: str) -> None:
    """Import the modules that programs import, and serve requests."""
    for name in IMPORTED_BEFORE:
        importlib.import_module(name)
    logging.root.handlers.clear()
    gc.freeze()
    sys.path.remove(os.getcwd())  # a program must not find the project merely through the server
    server = Server(address)
    print("listens", flush=True)  # noqa: T201
    arguments = server.serve()
    try:
        become(arguments)
    except BaseException as error:
        end(error)
    end(None)


if __name__ == "__main__":
    # Import this module under its own name, because programs become `__main__`.
    importlib.import_module("tests.support.programs").main(sys.argv[1])
