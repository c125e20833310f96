"""One run at a time in a folder: an advisory lock, which the system releases with the process, however it ends."""

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vim.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger("vision_mamba")

NAME = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)
# A file server gives up the lock of a machine that is gone after a lease, of 90 s by default.
REQUEUED_WAIT_S, RETRY_S = 180, 2.0


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Inside, no other process holds the folder's lock; None needs none.

    The lock is POSIX's, of the process: loader processes do not inherit it, and file servers pass it on to other hosts.
    Where the file system has no locks, a warning says so. A job that SLURM has started again waits for a while, as the
    lock may be that of its own predecessor, whose machine is gone.

    Raises:
        UserError: another process holds it, or the file cannot be written.
    """
    descriptor = None if folder is None else _take(folder / NAME)
    try:
        yield
    finally:
        if descriptor is not None:
            # While it is held: who waits with the removed file open finds that it is no longer the folder's.
            with suppress(OSError):
                (folder / NAME).unlink(missing_ok=True)
            os.close(descriptor)


def requeued() -> bool:
    """Whether SLURM has started this job before."""
    return bool(os.environ.get("SLURM_RESTART_COUNT", "0").strip("0"))


def wait_for_predecessor(folder: Path) -> None:
    """Wait until the folder of a requeued job is free, so that what is then read is the last that was written.

    Raises:
        UserError: see `locked`.
    """
    if folder.is_dir():
        with locked(folder):
            pass


def _take(path: Path) -> int | None:
    if fcntl is None:
        return None
    patience = time.monotonic() + (REQUEUED_WAIT_S if requeued() else 0)
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"--output-dir {path.parent} cannot be written: {error.strerror}") from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is(path, descriptor):
                os.close(descriptor)
                continue
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") if error.errno in _HELD else ""
            os.close(descriptor)
            if error.errno in _HELD and time.monotonic() < patience:
                _logger.info("waiting for the lock of %s, held by %s", path.parent, holder or "a run that has begun")
                time.sleep(RETRY_S)
                continue
            if error.errno in _HELD:
                raise UserError(
                    f"another run ({holder or 'which has just begun'}) writes into --output-dir {path.parent}: wait "
                    f"for its end, or give this one another folder; if its machine is gone, remove {path}"
                ) from error
            _logger.warning(
                "%s cannot be locked (%s): see to it that no other run writes into it", path.parent, error.strerror
            )
            path.unlink(missing_ok=True)
            return None
        return descriptor


def _is(path: Path, descriptor: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
