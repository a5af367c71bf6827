"""Who, when, where and from which code: recorded with every artifact, never part of its identity."""

from __future__ import annotations

import datetime as dt
import functools
import getpass
import platform
import socket
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder of this checkout: the application always runs from it."""


class Provenance(BaseModel):
    """The circumstances of one stage execution."""

    model_config = ConfigDict(frozen=True)

    created_at: str
    """UTC, ISO 8601."""
    duration_s: float
    """Seconds that the stage body took, on the monotonic clock; publication (hashing, fsync) comes after it."""
    git_commit: str
    """Commit of the checkout, with `+dirty` when tracked files were modified; `unknown` outside git."""
    source_digest: str
    """sha256 over the source files of the stage."""
    user: str
    host: str
    python: str
    data_hash: str | None = None
    """DVC hash of the corpus that this artifact descends from."""


def capture(*, duration_s: float, source_digest: str, data_hash: str | None) -> Provenance:
    """Record the circumstances of a stage that has just finished."""
    return Provenance(
        created_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        duration_s=round(duration_s, 3),
        git_commit=git_commit(),
        source_digest=source_digest,
        user=_user(),
        host=socket.gethostname(),
        python=platform.python_version() + " " + sys.platform,
        data_hash=data_hash,
    )


@functools.cache
def git_commit(checkout: Path = CHECKOUT) -> str:
    """Return the commit of the checkout, `+dirty` appended when tracked files differ from it."""
    head = _git(checkout, "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+dirty" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else "")


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a user id that has no entry in /etc/passwd.
        return "unknown"
