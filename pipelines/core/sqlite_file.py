"""SQLite databases that other tools lay out (MLflow, Prefect) come into being whole or not at all.

Their hundred migrations take seconds, and a database whose migrations were cut off opens for nobody ever again. So a
database is made beside its place and renamed into it when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.core.errors import ConfigError
from pipelines.core.fault_injection import fault_point

_NEW = ".new"
_ODD = {"?", "%"}
"""What a path in a URL cannot hold."""
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


def url(path: Path) -> str:
    """Return the URL of a database, as SQLAlchemy takes it.

    A URL ends its path at `?`, and MLflow decodes `%`. A database below a folder with such a name is reached through a
    link with a plain name, in a folder of this user's alone.

    Args:
        path: absolute path of the database, whose folder is there already or is made later.

    Raises:
        ConfigError: that folder of links is somebody else's.
    """
    if not _ODD & set(str(path)):
        return f"sqlite:///{path}"
    links = Path(tempfile.gettempdir()) / f"ingot-links-{os.geteuid()}"
    links.mkdir(mode=0o700, exist_ok=True)
    if links.is_symlink() or links.stat().st_uid != os.geteuid() or _ODD & set(str(links)):
        raise ConfigError(
            f"{path} has one of {' '.join(sorted(_ODD))} in its name, and {links} cannot hold a link to it",
            hint="let INGOT_STORE name a folder without them",
        )
    link = links / hashlib.sha256(os.fsencode(path.parent)).hexdigest()[:16]
    if not link.is_symlink() or link.readlink() != path.parent:
        with tempfile.TemporaryDirectory(dir=links) as beside:
            (Path(beside) / "link").symlink_to(path.parent)
            (Path(beside) / "link").replace(link)
    return f"sqlite:///{link / path.name}"
