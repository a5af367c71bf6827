"""One process at a time changes a registered model: a file lock within a store, a lock of the registry between stores.

A SQLite registry is a file, and the file lock lies beside it, where every store that shares it looks. PostgreSQL lends
advisory locks: the session that holds one loses it when its process, its host or its connection ends, so a dead holder
blocks nobody. Other databases and MLflow's own server have nothing to lend: there promotions of two stores are only
re-checked (see `Registry.promote`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core import lock
from pipelines.core.errors import ConfigError, LockedError
from pipelines.tracking.client import lease_folder

if TYPE_CHECKING:
    from sqlalchemy import Connection

_SPACE = 0x1960
"""First half of our advisory locks' keys; the second is of the model's name."""
_TIMED_OUT = "55P03"
"""PostgreSQL's `lock_not_available`."""
_HOLDER = """
SELECT a.application_name || ' at ' || coalesce(host(a.client_addr), 'the server')
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname =
current_database()) AND l.classid = :space AND l.objid = CAST(:name AS bigint) & 4294967295
"""


@contextlib.contextmanager
def hold(uri: str, store_root: Path, model: str, *, wait_s: float) -> Iterator[None]:
    """Hold the right to change one registered model for the length of the block.

    Args:
        uri: where MLflow is.
        store_root: root of the store.
        model: name of the registered model.
        wait_s: how long to wait for another holder, above 0.

    Raises:
        LockedError: another process still held it; the message names it.
        ConfigError: the driver of the database is not installed.
        SQLAlchemyError: the database does not answer.
    """
    what = f"the registered model {model}"
    with contextlib.ExitStack() as held:
        held.enter_context(
            lock.hold(lease_folder(uri, store_root) / f"registry-{model}.lock", what=what, wait_s=wait_s)
        )
        if uri.startswith("postgresql"):
            held.enter_context(_advisory(uri, key(model), what, wait_s))
        yield


def key(name: str) -> int:
    """Return the second half of a lock's key: 32 bits, signed, as PostgreSQL takes them."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big", signed=True)


@contextlib.contextmanager
def _advisory(uri: str, name: int, what: str, wait_s: float) -> Iterator[None]:
    import sqlalchemy
    from sqlalchemy.pool import NullPool

    try:
        engine = sqlalchemy.create_engine(uri, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what}: its registry is a PostgreSQL database, and there is no driver for it: {error}",
            hint='pip install "psycopg[binary]"',
        ) from error
    keys = {"space": _SPACE, "name": name}
    with engine.connect() as connection:
        _introduce(connection, wait_s)
        try:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:space, :name)"), keys)
        except sqlalchemy.exc.OperationalError as error:
            # The one driver calls it sqlstate, the older one pgcode.
            if getattr(error.orig, "sqlstate", getattr(error.orig, "pgcode", None)) != _TIMED_OUT:
                raise
            holder = connection.execute(sqlalchemy.text(_HOLDER), keys).scalar() or "another process"
            raise LockedError(
                f"{what} is locked by {holder}", hint="wait for that run, or stop it, then run again"
            ) from None
        try:
            yield
        finally:
            # The end of the session frees the lock too; said aloud, it does not wait for the server to notice.
            with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):
                connection.execute(sqlalchemy.text("SELECT pg_advisory_unlock(:space, :name)"), keys)


def _introduce(connection: Connection, wait_s: float) -> None:
    """Tell the server who asks and how long it waits."""
    import sqlalchemy

    settings = {
        "application_name": f"ingot process {os.getpid()} on {socket.gethostname()}"[:63],
        "lock_timeout": str(max(1, round(1000 * wait_s))),
        "idle_session_timeout": "0",
    }
    # Servers older than 14 end no idle session, and do not know the setting.
    known = "SELECT set_config(:name, :value, false) WHERE EXISTS (SELECT FROM pg_settings WHERE name = :name)"
    for name, value in settings.items():
        connection.execute(sqlalchemy.text(known), {"name": name, "value": value})
