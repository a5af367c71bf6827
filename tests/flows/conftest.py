"""One finished smoke run for the whole session, made by the real command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.prefect_process import Server

CHECKOUT = Path(__file__).resolve().parents[2]
Ingot = Callable[..., subprocess.CompletedProcess[str]]


def environment(store: Path) -> dict[str, str]:
    """The environment of a command on a store of its own, far from any server of the user's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_", "INGOT_"))}
    return kept | {"INGOT_STORE": str(store), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def call(store: Path, *arguments: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run `ingot` and require its exit code (None: any)."""
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment(store), capture_output=True, text=True)
    assert check is None or done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def empty_store(tmp_path: Path) -> Path:
    """A store that does not exist yet."""
    return tmp_path / "store"


@pytest.fixture
def ingot(empty_store: Path) -> Ingot:
    """The command on an empty store."""
    return lambda *arguments, check=0: call(empty_store, *arguments, check=check)


@pytest.fixture(scope="session")
def smoke_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a finished smoke run."""
    store = tmp_path_factory.mktemp("smoke") / "store"
    done = call(store, "run", "--recipe", "smoke", "--json")
    (store / "stdout.json").write_text(done.stdout)
    (store / "stderr.txt").write_text(done.stderr)
    return store


@pytest.fixture(scope="session")
def smoke_result(smoke_store: Path) -> dict[str, Any]:
    """What `ingot run --json` printed."""
    found: dict[str, Any] = json.loads((smoke_store / "stdout.json").read_text())
    return found


@pytest.fixture
def smoke(smoke_store: Path) -> Ingot:
    """The command on the store of the finished smoke run."""
    return lambda *arguments, check=0: call(smoke_store, *arguments, check=check)


@pytest.fixture
def run_in() -> Ingot:
    """The command on a store that the test names first."""
    return lambda store, *arguments, check=0: call(store, *arguments, check=check)


@pytest.fixture
def environment_of() -> Callable[[Path], dict[str, str]]:
    """The environment of a command on a store."""
    return environment


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A Prefect server, and an empty store for what runs there."""
    (tmp_path / "home").mkdir()
    made = Server(tmp_path / "home", environment(tmp_path / "store") | {"INGOT_CHECKOUT": str(CHECKOUT)})
    with made.running():
        yield made
