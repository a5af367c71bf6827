"""A store whose MLflow database is migrated already (SQLite's migration takes seconds), and disks that fill up."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty, migrated MLflow database, made once per session."""
    from pipelines.tracking.client import connect
    from pipelines.tracking.config import TrackingConfig

    root = tmp_path_factory.mktemp("mlflow")
    database = root / "mlflow.db"
    connect(TrackingConfig(uri=f"sqlite:///{database}"), root)
    return database


@pytest.fixture
def store_root(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own for each test, MLflow ready."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "store"
    root.mkdir()
    shutil.copyfile(mlflow_database, root / "mlflow.db")
    return root


@dataclass(frozen=True)
class Disk:
    """A real file system of its own, in memory."""

    path: Path

    def resize(self, kib: int) -> None:
        """Give it another size."""
        subprocess.run(["mount", "-o", f"remount,size={kib}k", str(self.path)], check=True)


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[int], Disk]]:
    """Return a function that makes a disk of so many KiB."""
    made: list[Path] = []

    def make(kib: int) -> Disk:
        path = tmp_path / f"disk{len(made)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(path)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted here")
        made.append(path)
        return Disk(path)

    yield make
    for path in made:
        subprocess.run(["umount", "-l", str(path)], check=True)
