"""Leases: at most one process works on an artifact, and a dead holder blocks nobody.

A lease is an operating-system file lock, so the kernel releases it when its holder dies, however it dies: no clock,
no heartbeat, no stale file. It therefore needs a file system with working `flock` (local disks, NFSv4).
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pipelines.core.errors import LockedError
from pipelines.core.processes import ProcessName, this_process

_POLL_S = 0.2


@contextlib.contextmanager
def hold(path: Path, *, what: str, wait_s: float | None = None) -> Iterator[None]:
    """Hold the lease at `path` for the length of the block.

    Args:
        path: the lock file.
        what: what is locked, for the error message.
        wait_s: how long to wait for another holder; None waits for ever, 0 not at all.

    Raises:
        LockedError: another process still held it; the message names that process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait_s is None else wait_s, poll_interval=_POLL_S)
    except Timeout:
        raise LockedError(
            f"{what} is locked by {_holder(path)}", hint="wait for that run, or stop it, then run again"
        ) from None
    try:
        with contextlib.suppress(OSError):  # a name for messages; `ingot gc` has to work where the disk is full
            _holder_file(path).write_text(this_process().model_dump_json(), encoding="utf-8")
        yield
    finally:
        _holder_file(path).unlink(missing_ok=True)
        lock.release()


def is_held(path: Path) -> bool:
    """Return whether a process, on whatever machine, holds the lease. Those who ask do not see one another."""
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back as the file closes
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _holder_file(path: Path) -> Path:
    return path.with_suffix(".holder")


def _holder(path: Path) -> str:
    try:
        holder = ProcessName.model_validate_json(_holder_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # The holder writes its name just after it takes the lock; a reader in between knows only that there is one.
        return "another process"
    # A killed holder leaves its name behind, which the next one has not yet replaced.
    return str(holder) if holder.alive() else "another process"
