"""Where runs are tracked: recipe before environment before the store's own SQLite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipelines.core.errors import ConfigError
from pipelines.tracking.config import TrackingConfig, artifact_root, recorded, resolve_uri


def test_the_default_is_sqlite_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(TrackingConfig(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


def test_the_environment_beats_the_default_and_the_recipe_beats_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert resolve_uri(TrackingConfig(), tmp_path) == "http://127.0.0.1:5000"
    assert resolve_uri(TrackingConfig(uri="http://127.0.0.1:6000"), tmp_path) == "http://127.0.0.1:6000"


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "ftp://x"])
def test_a_plain_folder_is_refused_with_the_reason(uri: str) -> None:
    with pytest.raises(ValidationError, match="registry needs one"):
        TrackingConfig(uri=uri)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("./mlruns", "registry needs one"),
        ("file:///tmp/mlruns", "registry needs one"),
        ("http://[::1", "is no address"),
        ("http://host:99999", "is no address"),
        ("http://", "names no host"),
        ("sqlite:///", "names no file"),
        ("sqlite://x.db", "names no file"),
        ("sqlite:///:memory:", "names no file"),
    ],
)
def test_what_can_be_no_mlflow_is_refused_wherever_it_is_named(
    uri: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValidationError, match=said):
        TrackingConfig(uri=uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=said) as caught:
        resolve_uri(TrackingConfig(), tmp_path)
    assert "unset MLFLOW_TRACKING_URI" in str(caught.value)


def test_nothing_about_tracking_is_identity() -> None:
    assert TrackingConfig(experiment="a").identity() == TrackingConfig(experiment="b").identity() == {}


def test_artifacts_of_a_database_lie_in_the_store_and_elsewhere_where_the_server_says(tmp_path: Path) -> None:
    assert artifact_root("sqlite:///x/mlflow.db", tmp_path) == (tmp_path / "mlartifacts").as_uri()
    assert artifact_root("postgresql://u@host/db", tmp_path) == (tmp_path / "mlartifacts").as_uri()
    for server in ("http://host", "https://host", "databricks"):
        assert artifact_root(server, tmp_path) is None


def test_configuration_and_session_import_no_mlflow() -> None:
    code = (
        "import sys, pipelines.tracking, pipelines.tracking.config, pipelines.registry.config, "
        "pipelines.registry.history, pipelines.registry.registry; "
        "print([m for m in ('mlflow', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_password_that_a_record_lost_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"uri": "http://***@host:5000", "experiment": "mine"}
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="in no record"):
        recorded(table)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:p@host:5000")
    config = recorded(table)
    assert (config.uri, config.experiment) == (None, "mine")
