"""One promotion at a time between stores that share a PostgreSQL registry: a real server, real processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.core.errors import LockedError, TransientError
from pipelines.core.program import ROOT as CHECKOUT
from pipelines.registry import registry_lock
from pipelines.tracking.client import reachable

LIMIT_S = 240.0
NOBODY = 65534
"""Who runs PostgreSQL, which refuses root, where these tests run as root."""


def program(name: str) -> str | None:
    """Where a program of PostgreSQL is: in the path, or where Debian keeps each version's."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(versions[-1]) if versions else None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The address of an empty PostgreSQL of our own, which dies with this process."""
    initdb, server = program("initdb"), program("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed: there is no initdb")
    other = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # not under pytest's folder, which only its owner may enter
    if other:
        os.chown(folder, NOBODY, NOBODY)
    data, port = folder / "data", free_port()
    try:
        made = [initdb, "-D", str(data), "-A", "trust", "-U", "ingot", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, cwd=folder, **other)
        command = [server, "-D", str(data), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1", "-F"]
        # That user may not be able to run our Python, so the kernel is asked to end the server by setpriv.
        guard = [setpriv, "--pdeathsig", "KILL"] if (setpriv := shutil.which("setpriv")) else []
        with (folder / "log").open("wb") as log:
            running = subprocess.Popen([*guard, *command], stdout=log, stderr=log, cwd=folder, **other)
        try:
            _wait_for(port, running, folder / "log")
            yield f"postgresql://ingot@127.0.0.1:{port}/postgres"
        finally:
            running.send_signal(signal.SIGINT)  # without waiting for clients
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(10)
            running.kill()
            running.wait()
    finally:
        shutil.rmtree(folder)


def _wait_for(port: int, running: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and running.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2):
            return
        time.sleep(0.05)
    raise AssertionError(f"PostgreSQL did not start: {log.read_text()}")


@pytest.fixture
def ask(postgres: str) -> Iterator[Callable[..., Any]]:
    """Run a statement in one session of the database and return its first value."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(postgres, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool)
    with engine.connect() as session:
        yield lambda text: session.execute(sqlalchemy.text(text)).scalar()


@pytest.fixture
def worlds(postgres: str, world_at: Callable[[Path, str], Any], tmp_path: Path) -> list[Any]:
    """Two stores whose models are registered in the same PostgreSQL."""
    return [world_at(tmp_path / name / "store", postgres) for name in ("one", "two")]


WAITING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


def wait_until(true: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    """Wait for something that another process brings about."""
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline
        if run.poll() is not None:
            raise AssertionError(run.communicate()[1])
        time.sleep(0.05)


def test_a_lock_of_one_model_leaves_another_model_free(postgres: str, tmp_path: Path) -> None:
    with (
        registry_lock.hold(postgres, tmp_path / "one", "model", wait_s=5),
        registry_lock.hold(postgres, tmp_path / "one", "another", wait_s=5),
    ):
        assert registry_lock.key("model") != registry_lock.key("another")


def test_a_second_store_waits_and_is_told_who_holds_the_model(postgres: str, tmp_path: Path) -> None:
    with (
        registry_lock.hold(postgres, tmp_path / "one", "model", wait_s=5),
        pytest.raises(LockedError, match=rf"model is locked by ingot process {os.getpid()} on .* at 127\.0\.0\.1"),
        registry_lock.hold(postgres, tmp_path / "two", "model", wait_s=0.2),
    ):
        raise AssertionError("two hold it")
    with registry_lock.hold(postgres, tmp_path / "two", "model", wait_s=0.2):
        pass


def test_a_failure_inside_frees_the_model(postgres: str, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), registry_lock.hold(postgres, tmp_path / "one", "model", wait_s=5):
        raise ZeroDivisionError
    with registry_lock.hold(postgres, tmp_path / "two", "model", wait_s=0.2):
        pass


def test_a_killed_holder_blocks_nobody(postgres: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom pipelines.registry import registry_lock\n"
        f"with registry_lock.hold({postgres!r}, Path({str(tmp_path / 'one')!r}), 'model', wait_s=5):\n"
        "    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError), registry_lock.hold(postgres, tmp_path / "two", "model", wait_s=0.1):
            pass
        holder.kill()
    with registry_lock.hold(postgres, tmp_path / "two", "model", wait_s=30):
        pass


def test_a_database_that_is_down_is_a_transient_fault(tmp_path: Path) -> None:
    uri = f"postgresql://ingot:c4n4ry@127.0.0.1:{free_port()}/postgres"
    with (
        pytest.raises(TransientError, match="tracking pending") as caught,
        reachable(uri, what="promote"),
        registry_lock.hold(uri, tmp_path, "model", wait_s=1),
    ):
        raise AssertionError("it is held")
    assert "c4n4ry" not in str(caught.value)


@pytest.mark.slow
def test_two_promotions_at_once_from_two_stores_leave_the_better_champion(worlds: list[Any], ask: Any) -> None:
    """Both are made to wait for the same lock, so that they come at once; neither changes anything before it has it."""
    first, second = worlds
    first.promote(first.candidate(2.0))
    assert ask(f"SELECT pg_advisory_lock({registry_lock._SPACE}, {registry_lock.key('ingot')})") == ""
    good, best = first.candidate(1.9, seed=1), second.candidate(1.8, seed=2)
    runs = [first.start_promotion("good", good), second.start_promotion("best", best)]
    for number, run in enumerate(runs, start=1):
        wait_until(lambda number=number: ask(WAITING) >= number, run)  # type: ignore[misc]
    assert len(first.client().search_model_versions("name = 'ingot'")) == 1
    ask(f"SELECT pg_advisory_unlock({registry_lock._SPACE}, {registry_lock.key('ingot')})")
    codes = []
    for run in runs:
        _, errors = run.communicate(timeout=LIMIT_S)
        codes.append(run.returncode)
        assert run.returncode in {0, 7}, errors
    assert codes[1] == 0
    client = first.client()
    champion = client.get_model_version_by_alias("ingot", "champion")
    assert champion.tags["fingerprint"] == best["model:pretrain"].manifest.fingerprint
    aliases = {alias: str(number) for alias, number in client.get_registered_model("ingot").aliases.items()}
    assert aliases == {"champion": str(champion.version)}
    prints = [version.tags["fingerprint"] for version in client.search_model_versions("name = 'ingot'")]
    assert len(prints) == len(set(prints)) == (3 if codes[0] == 0 else 2)
