"""The registry read without MLflow: what it says is what MLflow says, and where it cannot know, MLflow is asked."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from pipelines.registry import current, mlflow_database
from pipelines.registry.registry import list_models
from pipelines.tracking.config import TrackingConfig
from tests.flows.test_cli_light import heavy_modules_after


def database_of(world: Any) -> Path:
    """Return MLflow's database in the store of a world."""
    return Path(world.root) / "mlflow.db"


def populated(world: Any) -> None:
    """Register a champion, a better one, a deleted version, what others registered, and a prompt."""
    world.promote(world.candidate(2.0))
    world.promote(world.candidate(1.5, seed=1))
    client = world.client()
    gone = client.create_model_version("ingot", "file:///gone")
    client.delete_model_version("ingot", gone.version)
    client.set_registered_model_alias("ingot", "theirs", "1")
    for name, alias in (("theirs", "best"), ("theirs-champion", "champion")):
        client.create_registered_model(name)
        client.set_registered_model_alias(name, alias, client.create_model_version(name, "s3://far/away").version)
    client.register_prompt("prompt", "Say {{ it }}.", tags={"fingerprint": "f"})
    client.set_prompt_alias("prompt", "champion", 1)


def test_it_says_what_mlflow_says(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    populated(world)
    names = ("ingot", "theirs", "theirs-champion", "prompt", "nobody")
    assert mlflow_database.versions(database_of(world)) is not None, "MLflow has another schema: compare, then add it"
    read = list_models(world.root), [current.champion(TrackingConfig(), world.root, name) for name in names]
    monkeypatch.setattr(mlflow_database, "SCHEMAS", frozenset())
    asked = list_models(world.root), [current.champion(TrackingConfig(), world.root, name) for name in names]
    assert read == asked
    assert [(row["name"], row["version"], row["aliases"]) for row in read[0]] == [
        ("ingot", "2", ["champion"]),
        ("ingot", "1", ["theirs"]),
        ("theirs-champion", "1", ["champion"]),
    ]


def test_what_it_cannot_know_is_left_to_mlflow(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.client()
    assert mlflow_database.versions(database_of(world)) == []
    monkeypatch.setenv("MLFLOW_WORKSPACE", "other")
    assert mlflow_database.versions(database_of(world)) is None
    monkeypatch.delenv("MLFLOW_WORKSPACE")
    for change in (
        "INSERT INTO registered_models (name, workspace) VALUES ('m', 'other')",
        "UPDATE alembic_version SET version_num = 'ffffffffffff'",
        "DELETE FROM alembic_version",
        "DROP TABLE alembic_version",
    ):
        with contextlib.closing(sqlite3.connect(database_of(world))) as database, database:
            database.execute(change)
        assert mlflow_database.versions(database_of(world)) is None, change
        if "INSERT" in change:
            with contextlib.closing(sqlite3.connect(database_of(world))) as database, database:
                database.execute("DELETE FROM registered_models")
    (tmp_path / "damaged.db").write_bytes(b"no database at all")
    assert mlflow_database.versions(tmp_path / "damaged.db") is None


def test_listing_models_loads_no_mlflow(world: Any) -> None:
    populated(world)
    for what in (("list", "models"), ("list", "champions"), ("show", "ingot@champion")):
        assert heavy_modules_after(*what, store=world.root) == []
