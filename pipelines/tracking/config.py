"""Where runs are tracked: the `tracking` section of a recipe. Imports no MLflow."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from pipelines.core import sqlite_file
from pipelines.core.errors import ConfigError
from pipelines.core.redaction import HIDDEN, redact
from pipelines.core.settings import NOT_IDENTITY, PATH, Settings, absolute, start_of
from pipelines.core.stage import TrackingTarget
from pipelines.core.store import SCHEME, open_store

VARIABLE = "MLFLOW_TRACKING_URI"
_ARTIFACTS = "mlartifacts"
_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")


class TrackingConfig(Settings):
    """The MLflow server or database that follows runs and holds the model registry."""

    uri: str | None = Field(
        None,
        description="MLflow tracking URI; default: $MLFLOW_TRACKING_URI, else SQLite in the store. The path in "
        "sqlite:///PATH is relative to the project.",
        json_schema_extra=NOT_IDENTITY | PATH,
    )
    experiment: str = Field(
        "ingot",
        min_length=1,
        max_length=500,
        description="MLflow experiment that the runs appear in.",
        json_schema_extra=NOT_IDENTITY,
    )
    dvc_files: str | None = Field(
        None,
        min_length=1,
        examples=["results"],
        description="Folder of the project in which a finished run leaves metrics.json and training.csv, for "
        "`dvc metrics diff` and `dvc plots diff`; none: nowhere.",
        json_schema_extra=NOT_IDENTITY,
    )
    timeout_s: int = Field(
        10, ge=1, le=600, description="Limit of one request to an MLflow server.", json_schema_extra=NOT_IDENTITY
    )
    finish_s: float = Field(
        60.0,
        ge=0,
        description="How long the end of a run waits for MLflow to catch up; what is left waits for `ingot sync`.",
        json_schema_extra=NOT_IDENTITY,
    )

    @field_validator("uri")
    @classmethod
    def _is_a_database_or_a_server(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        if fault := _fault_of(value):
            raise ValueError(f"{redact(value)!r} {fault}")
        return absolute(value, start_of(info))


def _fault_of(uri: str) -> str | None:
    """Return why an address cannot be that of MLflow; None where it may be."""
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in _SCHEMES:
        return (
            f"is neither a database nor a server (one of {', '.join(_SCHEMES)}): "
            "the model registry needs one, a plain folder will not do"
        )
    try:
        parts = urllib.parse.urlsplit(uri)
        parts.port  # noqa: B018 - asked for its error
    except ValueError as error:
        return f"is no address: {error}"
    if scheme == "sqlite" and (not uri.partition(":")[2].startswith("///") or parts.path in {"", "/", "/:memory:"}):
        return "names no file: write sqlite:///PATH"
    if scheme in {"http", "https"} and not parts.hostname:
        return "names no host: write http://HOST:PORT"
    return None


def recorded(table: Mapping[str, Any]) -> TrackingConfig:
    """Return the settings that a run record has; where a password was removed from the URI, the environment's.

    Raises:
        ConfigError: the environment names none either.
    """
    if HIDDEN not in (table.get("uri") or ""):
        return TrackingConfig(**table)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(
            f"MLflow was at {table['uri']}: the password is in no record",
            hint="set MLFLOW_TRACKING_URI to the whole URI",
        )
    return TrackingConfig(**{**table, "uri": None})


def config_of(target: TrackingTarget) -> TrackingConfig:
    """Return the settings for a stage that talks to MLflow by itself."""
    return TrackingConfig(uri=target.uri, experiment=target.experiment, timeout_s=target.timeout_s)


def resolve_uri(config: TrackingConfig, store_root: Path) -> str:
    """Return the MLflow URI in force: the recipe's, else the environment's, else SQLite in the store.

    Raises:
        ConfigError: the environment's can be no MLflow.
    """
    if config.uri:
        return config.uri
    if named := os.environ.get(VARIABLE):
        if fault := _fault_of(named):
            raise ConfigError(
                f"${VARIABLE} = {redact(named)!r} {fault}",
                hint=f"unset {VARIABLE}, or let it name a database or server",
            )
        return named
    return sqlite_file.url(store_root.resolve() / "mlflow.db")


def artifact_root(uri: str, store_root: Path) -> str | None:
    """Return where MLflow keeps artifacts: in the store for a database; None leaves it to the server.

    With a database MLflow's own choice is a folder wherever the first process happened to run. Stores that share a
    database share the folder of the first, so on several machines it has to be a shared one, or a server it is.
    """
    if uri.startswith(("http:", "https:", "databricks")):
        return None
    store = open_store(store_root)
    return f"{store.address}/{_ARTIFACTS}" if store.address.startswith(SCHEME) else (store.root / _ARTIFACTS).as_uri()
