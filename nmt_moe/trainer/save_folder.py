"""Check that the checkpoint folder is used by one training run only and has enough disk space."""

import errno
import fcntl
import logging
import os
import shutil
import socket
import weakref
from pathlib import Path

from torch import nn

logger = logging.getLogger(__name__)

LOCK = ".training.lock"
# Error numbers that some network file systems return.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class FolderLock:
    """A lock that keeps other training runs out of a folder while this object exists.

    The operating system always releases the lock when the process ends, so a leftover lock file
    does no harm.
    """

    def __init__(self, folder: Path) -> None:
        """Lock a folder.

        Raises:
            ValueError: if the folder is locked; the message names the process that holds the lock.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        weakref.finalize(self, os.close, file)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(file, 200).decode(errors="replace") or "another process"
            raise ValueError(
                f"`--save-dir` must be a folder that no other training run writes to, but {holder} "
                f"writes to `{folder}`. Wait until it has ended, or specify another folder."
            ) from error
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            logger.warning(
                "the disk of %s does not support locks (%s): make sure that no other run writes to "
                "it",
                folder,
                error.strerror,
            )
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())


def remove_unfinished_files(folder: Path) -> None:
    """Delete the partial files that interrupted saves left."""
    for path in folder.glob("*.pt.tmp"):
        path.unlink()


def warn_of_little_room(folder: Path, model: nn.Module, with_optimizer: bool) -> None:
    """Warn if the disk has no room for two checkpoints, an old one and a new one.

    Args:
        folder: The folder for checkpoints.
        model: The model.
        with_optimizer: Whether checkpoints contain optimizer state, which is assumed to be two
            numbers per parameter, as in Adam.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    needed, free = 2 * size * (3 if with_optimizer else 1), shutil.disk_usage(folder).free
    if free < needed:
        logger.warning(
            "`--save-dir` %s has %.1f MB free, but two checkpoints of this model may need %.1f MB",
            folder,
            free / 1e6,
            needed / 1e6,
        )
