"""Commands as a user whom the system does not know, without a home, as containers run them; on another user's files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.run_record import NodeRecord, Runs

CHECKOUT = Path(__file__).resolve().parents[2]
UID = 23456
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root, with util-linux, can be another user"
)
Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user may enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="ingot-users-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def stranger(place: Path) -> Call:
    """Run python as a user without name and home."""
    own = place / "own"
    own.mkdir()
    os.chown(own, UID, UID)
    user = ["setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups"]

    def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        unset = {"HOME", "USER", "LOGNAME", "LNAME", "USERNAME"}
        dropped = ("PREFECT_", "MLFLOW_", "INGOT_", "XDG_", "PYTEST_")
        kept = {k: v for k, v in os.environ.items() if k not in unset and not k.startswith(dropped)}
        environment = (
            kept | {"PYTHONPATH": str(CHECKOUT), "TMPDIR": str(own), "PYTHONDONTWRITEBYTECODE": "1"} | variables
        )
        return subprocess.run(
            [*user, sys.executable, *arguments], cwd=CHECKOUT, env=environment, capture_output=True, text=True
        )

    return call


def test_libraries_find_a_home_and_a_name(stranger: Call, place: Path) -> None:
    code = (
        "from pipelines.core import environment\nenvironment.find_home()\n"
        "import getpass, prefect\nfrom pathlib import Path\n"
        "home = Path.home()\nprint(home, oct(home.stat().st_mode), getpass.getuser())"
    )
    done = stranger("-c", code)
    assert done.stdout == f"{place}/own/ingot-home-{UID} 0o40700 {UID}\n", done.stderr


def test_a_home_that_somebody_else_has_made_is_not_taken(stranger: Call, place: Path) -> None:
    (place / "own" / f"ingot-home-{UID}").mkdir()  # of root
    code = "from pipelines.core import environment\nenvironment.find_home()\nimport os\nprint(os.environ['HOME'])"
    done = stranger("-c", code)
    assert done.stdout.startswith(f"{place}/own/ingot-home-"), done.stderr
    assert done.stdout.strip() != f"{place}/own/ingot-home-{UID}"


def test_another_users_store_can_be_looked_at_and_says_whose_it_is_when_it_is_to_be_changed(
    stranger: Call, place: Path
) -> None:
    store = place / "store"
    nodes = {"prepare": NodeRecord(stage="prepare", fingerprint="f")}
    runs = Runs(store)
    record = runs.start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes=nodes)
    runs.finish(record, "failed", 4)
    closed = runs.start(recipe="closed", overrides=[], config={}, data_hash="d", nodes=nodes)
    runs.finish(closed, "failed", 4)
    (runs.folder(closed.id) / "run.json").chmod(0o600)
    (store / "scratch" / "prepare-0123").mkdir(parents=True)
    ingot = ("-m", "flows")
    listed = stranger(*ingot, "list", "runs", INGOT_STORE=str(store))
    assert record.id in listed.stdout, listed.stderr
    assert f"{closed.id}/run.json is damaged (it is empty, or closed to this user); it is left out" in listed.stderr
    refused = stranger(*ingot, "gc", "--yes", INGOT_STORE=str(store))
    assert refused.returncode == 2
    assert "belongs to user 0" in refused.stderr
    assert "INGOT_STORE=FOLDER" in refused.stderr
    store.chmod(0o700)
    refused = stranger(*ingot, "list", "runs", INGOT_STORE=str(store))
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert f"{store}: permission denied ({store} belongs to user 0, mode 700" in refused.stderr


def test_dvc_in_another_users_project_says_what_to_do(stranger: Call, place: Path) -> None:
    project = place / "project"
    (project / ".dvc" / "tmp").mkdir(parents=True)
    code = (
        "from pathlib import Path\nfrom pipelines.core.errors import ConfigError\nfrom pipelines.data import dvc\n"
        f"try:\n    dvc.run(Path({str(project)!r}), 'status')\nexcept ConfigError as error:\n    print(error)"
    )
    done = stranger("-c", code)
    assert f"DVC keeps locks in {project}/.dvc/tmp, which cannot be written to: permission denied" in done.stdout
    assert "git clone" in done.stdout
