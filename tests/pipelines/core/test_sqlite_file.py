"""Databases come into being whole: a maker that is killed anywhere leaves none, and the next one is not disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pipelines.core import sqlite_file
from pipelines.core.errors import ConfigError

TABLES = 5
MAKER = f"""
import contextlib, sqlite3, sys
from pathlib import Path
from typing import Any
from pipelines.core import sqlite_file
from pipelines.core.fault_injection import fault_point

def make(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=" + sys.argv[2])
        for number in range({TABLES}):
            with database:
                database.execute(f"CREATE TABLE t{{number}} (x)")
            fault_point("test.migrated", table=number)

sqlite_file.create(Path(sys.argv[1]), make)
"""


def run_maker(path: Path, journal: str, faults: list[dict[str, Any]]) -> int:
    """Make the database in a process of its own, and return its exit code."""
    plan = path.with_name(f"faults-{len(list(path.parent.iterdir()))}.json")
    plan.write_text(json.dumps(faults))
    environment = {**os.environ, "INGOT_FAULTS": str(plan)}
    return subprocess.run([sys.executable, "-c", MAKER, str(path), journal], env=environment, check=False).returncode


def tables(path: Path) -> int:
    """Return how many tables a database has."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        return int(database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0])


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_a_maker_that_is_killed_at_any_point_leaves_no_database(tmp_path: Path, journal: str) -> None:
    path = tmp_path / "work.db"
    moments: list[dict[str, Any]] = [{"point": "test.migrated", "table": number} for number in (0, TABLES - 1)]
    for moment in (*moments, {"point": "sqlite.before_rename"}):
        assert run_maker(path, journal, [{**moment, "action": "SIGKILL"}]) == -signal.SIGKILL
        assert not path.exists()
    assert run_maker(path, journal, []) == 0
    assert tables(path) == TABLES
    assert [other.name for other in tmp_path.glob("work.db?*")] == []


def test_a_database_with_a_row_or_a_recent_write_is_not_empty(tmp_path: Path) -> None:
    path = tmp_path / "work.db"
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE runs (x)")
        database.execute("CREATE TABLE versions (x)")
        database.execute("INSERT INTO versions VALUES (1)")
    assert not sqlite_file.is_empty(path, ("runs",), settled_s=60.0)
    assert sqlite_file.is_empty(path, ("runs", "absent"), settled_s=0.0)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO runs VALUES (1)")
    assert not sqlite_file.is_empty(path, ("runs", "absent"), settled_s=0.0)


@pytest.mark.parametrize(
    "name", ["plain", "why?", "a%20b", "100%", "a#b", "it's", 'q"q', "a b;c&d=e", "\u00fcn\u00ef", "x" * 200]
)
def test_the_url_of_a_database_leads_to_that_database_and_nowhere_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlalchemy

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = tmp_path / name / ".ingot"
    store.mkdir(parents=True)
    before = {path for path in tmp_path.iterdir() if not path.name.startswith("ingot-links")}
    for _ in range(2):
        url = sqlite_file.url(store / "mlflow.db")
        assert not {"?", "%"} & set(url)
        with sqlalchemy.create_engine(url).begin() as database:
            database.execute(sqlalchemy.text("CREATE TABLE IF NOT EXISTS t (x)"))
    assert tables(store / "mlflow.db") == 1
    assert {path for path in tmp_path.iterdir() if not path.name.startswith("ingot-links")} == before


def test_a_folder_of_links_that_is_a_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"ingot-links-{os.geteuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="INGOT_STORE"):
        sqlite_file.url(tmp_path / "why?" / "mlflow.db")
