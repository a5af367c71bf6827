"""Errors of Python and of libraries, really raised, become ours: what, where, what to do; others stay unknown."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import re
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zstandard

from pipelines.core import boundary
from pipelines.core.artifact import read_json
from pipelines.core.errors import ConfigError, DiskFullError, IngotError, IntegrityError, TransientError

Broken = Callable[[Path], Any]


def locked(folder: Path) -> None:
    """Write to a database that another connection holds."""
    with sqlite3.connect(folder / "held.db") as holder:
        holder.execute("begin exclusive")
        sqlite3.connect(folder / "held.db", timeout=0).execute("create table t (x)")


def sqlalchemy_says(folder: Path) -> None:
    """Open a database that is none, as MLflow does."""
    import sqlalchemy

    (folder / "no.db").write_bytes(b"this is no database, however long one looks at it" * 100)
    with sqlalchemy.create_engine(f"sqlite:///{folder / 'no.db'}").connect() as connection:
        connection.execute(sqlalchemy.text("select 1 from sqlite_master"))


def cut_gzip(folder: Path) -> None:
    """Read a gzip that ends early."""
    (folder / "cut.gz").write_bytes(gzip.compress(b"text" * 1000)[:20])
    with gzip.open(folder / "cut.gz") as file:
        file.read()


def cut_weights(folder: Path) -> None:
    """Read weights that end early."""
    from safetensors import safe_open

    (folder / "cut.safetensors").write_bytes(b"\x08\0\0\0")
    safe_open(folder / "cut.safetensors", framework="np")


def killed_worker(_: Path) -> None:
    """Lose a worker of a pool, as the kernel's killer takes one."""
    with ProcessPoolExecutor(1) as pool:
        pool.submit(os._exit, 9).result()


def cut_json(folder: Path) -> None:
    """Read half a JSON file."""
    (folder / "half.json").write_text('{"a": [1, 2')
    read_json(folder / "half.json")


def wrapped(folder: Path) -> None:
    """Raise what a library makes of an error of the system."""
    try:
        (folder / "absent").read_text()
    except OSError as error:
        raise RuntimeError("something went wrong") from error


def fails_with(number: int) -> Broken:
    """Return a function that fails with this error of the system on a file."""

    def fail(folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder / "file"))

    return fail


@pytest.mark.parametrize(
    ("broken", "kind", "said"),
    [
        (fails_with(errno.EACCES), ConfigError, ["/file", "permission denied", "mode", "INGOT_STORE"]),
        (fails_with(errno.EROFS), ConfigError, ["/file", "read-only", "INGOT_STORE"]),
        (fails_with(errno.ENOSPC), DiskFullError, ["/file", "no space", "ingot gc"]),
        (fails_with(errno.EMFILE), TransientError, ["too many files", "ulimit"]),
        (fails_with(errno.EIO), TransientError, ["/file", "input/output error"]),
        (fails_with(errno.ENAMETOOLONG), ConfigError, ["/file", "too long"]),
        (fails_with(errno.ENOMEM), TransientError, ["memory"]),
        (lambda folder: (folder / "absent").read_text(), ConfigError, ["/absent", "no such file"]),
        (lambda folder: folder.read_text(), ConfigError, ["is a directory"]),
        (lambda _: subprocess.run(["no-such-program"], check=True), ConfigError, ["no-such-program", "install"]),
        (lambda _: urllib.request.urlopen("http://127.0.0.1:1"), TransientError, ["refused"]),
        (locked, TransientError, ["locked"]),
        (sqlalchemy_says, IntegrityError, ["database is damaged", "mlflow.db"]),
        (cut_gzip, IntegrityError, ["damaged"]),
        (lambda _: zstandard.decompress(b"no zstandard"), IntegrityError, ["damaged"]),
        (cut_weights, IntegrityError, ["damaged"]),
        (cut_json, IntegrityError, ["half.json", "no whole JSON"]),
        (lambda _: json.loads("{"), IntegrityError, ["no whole JSON"]),
        (lambda _: b"\xff".decode(), IntegrityError, ["damaged"]),
        (killed_worker, TransientError, ["killed", "memory"]),
        (lambda _: bytearray(1 << 62), TransientError, ["memory"]),
        (wrapped, ConfigError, ["/absent"]),
    ],
)
def test_what_a_library_raises_says_what_where_and_what_to_do(
    broken: Broken, kind: type[IngotError], said: list[str], tmp_path: Path
) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it raises is what is tested
        broken(tmp_path)
    known = boundary.known(caught.value)
    assert type(known) is kind, (caught.value, known)
    assert known is not None
    text = str(known).lower()
    assert all(part.lower() in text for part in said), text
    assert known.hint
    with pytest.raises(kind), boundary.explained():
        broken(tmp_path)


def test_what_nobody_foresaw_stays_what_it_is() -> None:
    for error in (KeyError("x"), AttributeError("no such thing"), RuntimeError("odd"), ValueError("wrong")):
        assert boundary.known(error) is None
        with pytest.raises(type(error)), boundary.explained():
            raise error
    ours = ConfigError("as it is")
    assert boundary.known(ours) is ours


def test_the_way_out_of_a_store_of_others_works(tmp_path: Path) -> None:
    """The command in the message is run: files become the group's to write, also those that come later."""
    store = tmp_path / "store"
    (store / "runs").mkdir(parents=True)
    (store / "runs" / "run.json").write_text("{}")
    store.chmod(0o700)
    known = boundary.known(PermissionError(errno.EACCES, "Permission denied", str(store / "runs" / "x")))
    command = re.search(r"`(chgrp .*?)`", str(known))
    assert command is not None
    group = str(os.getegid())
    subprocess.run(command[1].replace("GROUP", group).replace("STORE", str(store)), shell=True, check=True)
    assert (store / "runs" / "run.json").stat().st_mode & 0o060 == 0o060
    assert (store / "runs").stat().st_mode & 0o2070 == 0o2070


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    done = subprocess.run(
        f"{sys.executable} -m flows list compressors | head -c 1",
        shell=True, executable="/bin/bash", cwd=Path(__file__).parents[3], capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert io.StringIO(done.stdout).read(1) == done.stdout
