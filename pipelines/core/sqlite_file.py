"""SQLite databases that other tools lay out (MLflow, Prefect) come into being whole or not at all.

Their hundred migrations take seconds, and a database whose migrations were cut off opens for nobody ever again. So a
database is made beside its place and renamed into it when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.core.fault_injection import fault_point

_NEW = ".new"
_COMPANIONS = ("", "-journal", "-wal", "-shm")
"""What SQLite keeps beside a database."""


def create(path: Path, make: Callable[[Path], None]) -> None:
    """Have a database made, and put it in its place complete.

    Args:
        path: where it belongs; nothing may be there. The caller holds a lease on it.
        make: lays the database out at the path that it is given, and closes every connection to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + _NEW)
    _remove(new)  # of a process that was killed at it
    make(new)
    fault_point("sqlite.before_rename", path=new)
    with contextlib.closing(sqlite3.connect(new)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # what still stands in a log would stay behind
    with new.open("rb") as written:
        os.fsync(written.fileno())
    new.replace(path)
    _remove(new)


def is_empty(path: Path, tables: Sequence[str], *, settled_s: float) -> bool:
    """Return whether none of these tables has a row, or exists, and nobody has written for `settled_s` seconds."""
    if time.time() - path.stat().st_mtime < settled_s:
        return False
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
        present = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return not any(
            database.execute(f'SELECT 1 FROM "{table}" LIMIT 1').fetchone()  # noqa: S608 - names of ours
            for table in present.intersection(tables)
        )


def set_aside(path: Path) -> Path:
    """Move a database away under a name that says when, and return its new place."""
    aside = path.with_name(f"{path.name}.unusable-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}")
    for ending in _COMPANIONS:
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{ending}").rename(f"{aside}{ending}")
    return aside


def _remove(path: Path) -> None:
    for ending in _COMPANIONS:
        Path(f"{path}{ending}").unlink(missing_ok=True)
