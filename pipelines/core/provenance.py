"""Who, when, where and from which code: recorded with every artifact, never part of its identity."""

from __future__ import annotations

import datetime as dt
import getpass
import platform
import socket
import sys

from pydantic import BaseModel, ConfigDict

from pipelines.core import program


class Provenance(BaseModel):
    """The circumstances of one stage execution."""

    model_config = ConfigDict(frozen=True)

    created_at: str
    """UTC, ISO 8601."""
    duration_s: float
    """Seconds that the stage body took, on the monotonic clock; publication (hashing, fsync) comes after it."""
    git_commit: str
    """Commit of the program, with `+dirty` when tracked files were modified; its version where it was installed."""
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
        git_commit=program.commit(),
        source_digest=source_digest,
        user=_user(),
        host=socket.gethostname(),
        python=platform.python_version() + " " + sys.platform,
        data_hash=data_hash,
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a user id that has no entry in /etc/passwd.
        return "unknown"
