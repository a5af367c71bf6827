"""The one door to MLflow: its environment is set before it is imported, and its import waits until it is needed."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core import lock
from pipelines.core.errors import ConfigError, IngotError, TransientError
from pipelines.core.redaction import redact
from pipelines.tracking.config import TrackingConfig, artifact_root, resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

_OURS = {
    # A registry that unpickles runs whatever its files say; ours never needs to.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_RETRIES = {
    # MLflow's own defaults wait for up to 7 x 120 s on a server that does not answer.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
}
# Their progress lines and retry warnings would stand between ours; a failure is reported once, by us.
_LOUD = (
    "urllib3.connectionpool",
    "mlflow.store.db.utils",
    "mlflow.tracking._model_registry.client",
    "alembic",
    "alembic.runtime.migration",
)
MIGRATION_WAIT_S = 120.0
_LASTING = {"PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_PARAMETER_VALUE", "ENDPOINT_NOT_FOUND", "BAD_REQUEST"}
"""MLflow's answers that another attempt would get again."""


def set_environment(timeout_s: int) -> None:
    """Set MLflow's switches: pickle and telemetry always off, time-outs short unless the user chose their own."""
    os.environ.update(_OURS)
    for name, value in {**_RETRIES, "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s)}.items():
        os.environ.setdefault(name, value)


def connect(config: TrackingConfig, store_root: Path) -> MlflowClient:
    """Return a client of the tracking store and registry in force.

    A SQLite database that does not exist yet is created here (seconds), by one process at a time.
    """
    set_environment(config.timeout_s)
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    uri = resolve_uri(config, store_root)
    if not uri.startswith("sqlite:"):
        return MlflowClient(uri, uri)
    Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    with lock.hold(lease_folder(uri, store_root) / "mlflow.lock", what="MLflow's database", wait_s=MIGRATION_WAIT_S):
        client = MlflowClient(uri, uri)
        client.get_experiment("0")
    return client


def lease_folder(uri: str, store_root: Path) -> Path:
    """Return where leases on an MLflow lie: beside a SQLite database, which stores may share; else in the store."""
    database = Path(uri.removeprefix("sqlite:///"))
    return (database.parent if uri.startswith("sqlite:") else store_root) / "leases"


def experiment_id(client: MlflowClient, config: TrackingConfig, store_root: Path) -> str:
    """Return the id of the experiment, creating it when missing; of two creators at once, one finds the other's."""
    from mlflow.exceptions import MlflowException

    if known := client.get_experiment_by_name(config.experiment):
        return str(known.experiment_id)
    try:
        return str(
            client.create_experiment(
                config.experiment, artifact_location=artifact_root(resolve_uri(config, store_root), store_root)
            )
        )
    except MlflowException:
        known = client.get_experiment_by_name(config.experiment)
        if known is None:
            raise
        return str(known.experiment_id)


@contextlib.contextmanager
def reachable(uri: str, *, what: str) -> Iterator[None]:
    """Turn every failure of MLflow inside the block into an error that says what to do.

    Raises:
        TransientError: MLflow did not answer, or answered that it cannot now.
        ConfigError: MLflow understood and refused.
    """
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except IngotError:
        raise
    except (MlflowException, RequestException, SQLAlchemyError, ConnectionError) as error:
        if getattr(error, "error_code", None) in _LASTING:
            raise ConfigError(
                f"{what}: MLflow at {redact(uri)} refused: {redact(_first_line(error))}",
                hint="check tracking.uri, and the user and password or token of MLFLOW_TRACKING_*",
            ) from error
        raise TransientError(
            f"{what}: tracking pending, MLflow at {redact(uri)} failed: {redact(_first_line(error))}",
            hint="every artifact is published; when MLflow answers again, `ingot sync` and `ingot promote` finish it",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
