"""A store whose MLflow database is migrated already: SQLite's migration takes seconds, copying its result none."""

from __future__ import annotations

import shutil
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
