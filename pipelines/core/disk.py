"""A full disk, told as one: what was being written, where, how much of it was there, how much is free, what to do.

Python, SQLite, Rust (safetensors, tokenizers) and subprocesses each say "no space" in a way of their own; `is_full`
knows them. Checkpoints have a way out of their own (older ones make room); see `training/checkpoint.py`.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipelines.core.errors import DiskFullError, IngotError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
HINT = "free some space (`ingot gc --dry-run` shows what is not needed), then run the same command again"
_MESSAGES = ("no space left on device", "disk quota exceeded", "database or disk is full")


def is_full(error: BaseException | None) -> bool:
    """Tell whether an error, or one that led to it, is that a disk is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if not isinstance(error, IngotError) and any(message in str(error).lower() for message in _MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def explained(what: str, folder: Path, *, remove: bool = False) -> Iterator[None]:
    """Turn errors of a full disk inside the block into one that says what to do.

    Args:
        what: what is being written.
        folder: where.
        remove: whether the folder is of no use unless it is complete, and is removed.

    Raises:
        DiskFullError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, IngotError) or not is_full(error):
            raise
        written = size_of(folder)
        if remove:
            shutil.rmtree(folder, ignore_errors=True)
        raise full(what, folder, f"{written} bytes were written before the disk was full") from error


def full(what: str, folder: Path, known: str) -> DiskFullError:
    """Return the error; `known` says what is known of the bytes that are needed."""
    return DiskFullError(f"no space for {what} in {folder}: {known}, {free(folder)} are free", hint=HINT)


def free(folder: Path) -> int:
    """Return the bytes that may still be written to the file system of a folder, which need not exist yet."""
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder; files that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
