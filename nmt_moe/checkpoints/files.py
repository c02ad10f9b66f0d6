"""Read and write files in torch's format, checking everything and executing nothing."""

import argparse
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

# Maximum size of the pickle that describes a file's tensors. It takes about 200 bytes per tensor.
MAX_PICKLE_BYTES = 64 * 2**20
# Maximum number of values in nested containers, counting each tensor as one value, and maximum
# depth of these containers.
MAX_VALUES = 4_000_000
MAX_DEPTH = 64

# Number of attempts to write a file during training. Training should not end because a disk is
# briefly full or the network is briefly down.
ATTEMPTS = 3
PAUSE = 2.5  # seconds between two attempts

COPY_AGAIN = "Copy it again, or specify another checkpoint in its folder."


def shown(value: Any) -> str:
    """Return one short printable line that shows a value from a file."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_file(path: Path, is_header_only: bool = False) -> Any:
    """Read a file that `torch.save` wrote.

    Before anything is allocated, the sizes of the file's parts are compared with its own size, and
    every part is compared with its CRC.

    Args:
        path: Path of the file.
        is_header_only: Whether to map tensors from the file and skip the CRCs, for callers that do
            not need the tensors' values.

    Returns:
        The saved value, with tensors on the CPU.

    Raises:
        ValueError: if the file is missing or damaged, or if it contains an object that could run
            code or a tensor of an unusual kind. The message names the file.
    """
    if not path.is_file():
        raise ValueError(f"`{path}` does not exist or is not a file")
    try:
        # Keep the file open until it is loaded, because another file could replace it in between.
        with path.open("rb") as file:
            is_archive = _check_archive(file, with_digests=not is_header_only)
            file.seek(0)
            source = path if is_header_only and is_archive else file
            with _allowing_settings():
                content = torch.load(
                    source, map_location="cpu", weights_only=True, mmap=source is path
                )
        _check_values(content)
    except Exception as error:  # a hostile pickle may raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise  # a file-system error already names the file
        raise ValueError(_describe(path, error)) from None
    return content


def _check_archive(file: BinaryIO, with_digests: bool) -> bool:
    """Check the sizes and CRCs of a zip file's parts.

    torch itself does not check CRCs and would silently load damaged weights.

    Returns:
        Whether the file is a zip file.

    Raises:
        ValueError: if a part is damaged. The message names the part or the fault.
    """
    if not zipfile.is_zipfile(file):  # files written before torch 1.6 have no CRCs
        return False
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("it is compressed, but torch never compresses files")
        if sum(part.file_size for part in parts) > size:
            raise ValueError("its parts are together larger than the file")
        if len({part.filename for part in parts}) < len(parts):
            raise ValueError("two of its parts have the same name")
        for part in parts:
            if part.filename.endswith("/data.pkl") and part.file_size > MAX_PICKLE_BYTES:
                raise ValueError(
                    f"its part {shown(part.filename)} has {part.file_size} bytes, more than the "
                    f"{MAX_PICKLE_BYTES} allowed"
                )
        damaged = archive.testzip() if with_digests else None
    if damaged is not None:
        raise ValueError(f"its part {shown(damaged)} is damaged")
    return True


def _check_values(content: Any) -> None:
    """Reject containers with too many or too deeply nested values, and malformed tensors."""
    for count, (value, depth) in enumerate(_walk(content)):
        if count >= MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError("its containers are nested too deeply or have too many values")
        if isinstance(value, Tensor):
            _check_tensor(value)


def _walk(content: Any) -> Iterator[tuple[Any, int]]:
    """Yield a value and everything in it, each with its nesting depth."""
    stack = [(content, 0)]
    while stack:
        value, depth = stack.pop()
        yield value, depth
        if isinstance(value, Mapping):
            stack.extend((item, depth + 1) for pair in value.items() for item in pair)
        elif isinstance(value, list | tuple | set | frozenset):
            stack.extend((item, depth + 1) for item in value)
        elif isinstance(value, argparse.Namespace):
            stack.append((vars(value), depth + 1))


def _check_tensor(value: Tensor) -> None:
    is_plain = value.layout == torch.strided and not value.is_quantized and not value.is_nested
    if not is_plain or value.device.type != "cpu":
        raise ValueError(
            "it contains a tensor that is sparse, quantised or nested, or has no values"
        )
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(value.shape)} has too few values")


def check_finite_values(path: Path, tensors: Any, name: str) -> None:
    """Reject NaN and infinities in nested containers.

    Args:
        path: File that the values come from.
        tensors: A tensor, or containers of tensors and other values.
        name: Name of these values in error messages.

    Raises:
        ValueError: if a value is not finite. The message names the file and the tensor.
    """
    if isinstance(tensors, Mapping):
        for key, value in tensors.items():
            check_finite_values(path, value, f"{name}[{shown(key)}]")
    elif isinstance(tensors, list | tuple):
        for index, value in enumerate(tensors):
            check_finite_values(path, value, f"{name}[{index}]")
    elif (
        isinstance(tensors, Tensor)
        and tensors.is_floating_point()
        and not torch.isfinite(tensors).all()
    ):
        raise ValueError(f"`{path}` has NaN or infinities in {name}. {COPY_AGAIN}")


def _describe(path: Path, error: Exception) -> str:
    """Return a message that explains why a file could not be read and how to fix it.

    The message leaves out torch's advice to trust the file.
    """
    text = str(error)
    found = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", text)
    if found:
        return (
            f"the checkpoint `{path}` contains a Python object of type {shown(found[1])}, which "
            "is not loaded, because unpickling it could run code. This project's checkpoints "
            "contain no such objects. Save it again without that object, or use another file."
        )
    reason = (
        text.rpartition("WeightsUnpickler error: ")[2].strip() or "no reason given"
    ).splitlines()[0]
    if "weights_only" in reason:  # torch's advice to turn its safe loader off
        reason = "another kind of archive"
    cause = f"{type(error).__name__}: {shown(reason)[1:-1]}"
    return (
        f"`{path}` ({path.stat().st_size} bytes) is not a complete fairseq checkpoint. It is "
        f"truncated or corrupted, or is another kind of file ({cause}). {COPY_AGAIN}"
    )


@contextmanager
def _allowing_settings() -> Iterator[None]:
    """Let torch's safe loader accept argparse.Namespace, but no other additional class.

    A Namespace is plain data: the settings of a model that has no dataclass.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            yield
    finally:
        torch.serialization.add_safe_globals(before)


def check_output(path: Path, is_overwritten: bool) -> None:
    """Reject an output that exists, unless it may be overwritten.

    Raises:
        ValueError: if the output is rejected. The message names it.
    """
    if os.path.lexists(path) and not is_overwritten:
        raise ValueError(f"`{path}` already exists. Specify another output, or add `--overwrite`.")


def write_whole(path: Path, content: Any, attempts: int = 1) -> None:
    """Write a file with `torch.save`, completely or not at all.

    Args:
        path: Path of the file.
        content: Values to save.
        attempts: Number of attempts, `PAUSE` seconds apart. Each starts with an empty file.

    Raises:
        OSError: if the file cannot be written. The message names the file and the reason, such as a
            full disk. An existing file with that name is left unchanged.
    """
    for attempt in range(1, attempts + 1):
        try:
            with _replacing(path) as file:
                torch.save(content, file)
            return
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError
            if attempt == attempts:
                size = sum(value.nbytes for value, _ in _walk(content) if isinstance(value, Tensor))
                raise _failed_write(path, error, size) from error
        time.sleep(PAUSE)


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file, completely or not at all.

    Raises:
        OSError: if the file cannot be copied. The message names the file and the reason. An
            existing file with that name is left unchanged.
    """
    with source.open("rb") as old:
        try:
            with _replacing(path) as file:
                shutil.copyfileobj(old, file, 2**20)
        except OSError as error:
            raise _failed_write(path, error, source.stat().st_size) from error


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file, which is renamed to `path` after it has been written to disk."""
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with create_exclusively(unfinished) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the new name must not reach the disk before the contents do
        os.replace(unfinished, path)
    except (OSError, RuntimeError):
        with suppress(OSError):  # raised, for example, if the folder is not writable
            unfinished.unlink(missing_ok=True)
        raise


def create_exclusively(path: Path) -> BinaryIO:
    """Open a new file for writing, replacing any file with that name and following no links."""
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def _failed_write(path: Path, error: BaseException, size: int) -> OSError:
    """Return an error for a failed write.

    Its message gives the system's reason, which torch's own error hides.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)
    try:
        free = f"{shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free"
    except OSError:
        free = "its folder cannot be opened"
    return OSError(
        f"cannot write `{path}`: {reason.splitlines()[0]}. It needs {size / 1e6:.1f} MB, and "
        f"{free}. All files written earlier are complete. Make room or specify another folder, and "
        "run the same command again. Training then resumes from the last checkpoint."
    )
