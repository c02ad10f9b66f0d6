"""End a fairseq command with one message instead of a traceback if users can fix the error."""

import json
import os
import re
import sys
import time
import traceback
from contextlib import suppress
from types import TracebackType

from hydra.errors import ConfigCompositionException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from torch import distributed

from nmt_moe.checks import describe_os_error

SHOW_TRACEBACK = "NMT_MOE_TRACEBACK"
# Errors that gloo and torch's store report when a process is gone.
LOST_PEER = re.compile(
    r"Connection (was likely )?(closed|reset|refused)|Broken pipe|recvValue failed|Failed to recv"
)
# If all ranks have an error, only the first prints it: torchrun ends the others while they wait.
WAIT_FOR_FIRST_RANK = 3.0  # seconds


def end_in_one_message() -> None:
    """Print errors that the user can fix as one message, in fairseq's commands only.

    Reason: a traceback of thirty lines hides its last line, which names the option or file.
    Programs that merely import fairseq handle exceptions as before. The exit status stays 1.
    """
    if is_fairseq_command() and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_error


def is_fairseq_command() -> bool:
    """Return whether this process runs a fairseq command, as a script or as a module."""
    return command_name().startswith("fairseq-")


def explain(error: BaseException) -> str | None:
    """Return a message that explains the error fully, or None if a traceback is needed.

    By convention, our ValueErrors report mistakes of the caller; fairseq raises a bare Exception
    for such mistakes.
    """
    raiser = _raiser(error)
    message = str(error).strip()
    if isinstance(error, RuntimeError) and LOST_PEER.search(message):
        return "another process in this training run has ended; see its error message for the cause"
    if not message:
        return None
    if isinstance(error, OmegaConfBaseException | ConfigCompositionException):
        return _explain_option(error, message)
    if isinstance(error, OSError):
        return _explain_os_error(error, message)
    if isinstance(error, FloatingPointError):
        return message
    if isinstance(error, ValueError) and raiser == "nmt_moe":
        return message
    if isinstance(error, AssertionError) and raiser == "fairseq_cli":
        return message  # a required option is missing
    if str(error) == "optimizer is required!":
        return "`--optimizer` must be set, for example --optimizer adam."
    if type(error) is Exception and raiser in ("fairseq", "fairseq_cli"):
        reason = error.__cause__ or error.__context__
        return message if reason is None else f"{message}\nReason: {str(reason).strip()}"
    return None


def _explain_os_error(error: OSError, message: str) -> str:
    """Return a message that names the file."""
    if isinstance(error, FileExistsError) and error.errno is None:
        # If a dictionary exists, fairseq-preprocess raises an error that contains only the path.
        return f"`{message}` already exists. Remove it or specify a different folder."
    return describe_os_error(error)


def _explain_option(error: BaseException, message: str) -> str:
    """Return which option is missing or has a value of the wrong type."""
    if isinstance(error, MissingMandatoryValue):
        return f"`--{str(error.full_key).split('.')[-1].replace('_', '-')}` must be set."
    if isinstance(error, OmegaConfBaseException):
        return f"the value of the option `{error.full_key}` cannot be used: {error.msg}."
    return f"{message}: {str(error.__cause__).splitlines()[0]}"


def _raiser(error: BaseException) -> str:
    """Return the top-level package of the module that raised the error."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return frames[-1][0].f_globals.get("__name__", "").split(".")[0] if frames else ""


def command_name() -> str:
    """Return the name of the running command, such as fairseq-train."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name.startswith("fairseq_cli."):
        return "fairseq-" + spec.name.split(".")[-1].replace("_", "-")
    return os.path.basename(sys.argv[0])


def _process() -> str:
    """Return text that names this process, if there are several."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return ""
    world_size = distributed.get_world_size()
    return f" in process {distributed.get_rank()} of {world_size}" if world_size > 1 else ""


def leave_for_torchrun(message: str) -> None:
    """Write an error to the file that torchrun reads, so that its own report ends with the cause.

    Reason: otherwise, its report would only advise users to enable tracebacks.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def _print_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    message = None if os.environ.get(SHOW_TRACEBACK) else explain(error)
    if message is None:
        sys.__excepthook__(kind, error, trace)
        return
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK") != "0":
        time.sleep(WAIT_FOR_FIRST_RANK)
    leave_for_torchrun(message)
    sys.stdout.flush()
    hint = f"({SHOW_TRACEBACK}=1 shows the traceback.)"
    print(f"{command_name()}: error{_process()}: {message}\n{hint}", file=sys.stderr)  # noqa: T201
