"""The one door to MLflow: its environment is set before it is imported, and its import waits until it is needed."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core import lock, sqlite_file
from pipelines.core.errors import ConfigError, IngotError, TransientError
from pipelines.core.redaction import redact
from pipelines.tracking.config import TrackingConfig, artifact_root, resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_SQLITE = "sqlite:///"
_OURS = {
    # A registry that unpickles runs whatever its files say; ours never needs to.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # It would print the address of every run, a password in it included.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
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
    "mlflow.store.model_registry.abstract_store",
    "mlflow.tracking._model_registry.client",
    "alembic",
    "alembic.runtime.migration",
)
_UPLOADS_AT_ONCE = 3
"""Few: a server that answers one request after another must still answer each within `tracking.timeout_s`."""
_LIMIT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_SLOWEST_BYTES_PER_S = 256 * 1024
_waiting: list[int] = []
"""Seconds that each upload on its way may take beyond the usual limit of a request."""
_usual_limit: dict[str, int] = {}
_limit_lock = threading.Lock()
MIGRATION_WAIT_S = 300.0
_WORK = ("runs", "registered_models", "datasets", "params", "metrics")
"""Tables of MLflow's database with a row as soon as anybody worked with it."""
_SETTLED_S = 30.0
"""A database that was written since may still be at its migrations, by a server of the user's."""
_CREDENTIAL_CODES = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
_SAYS_CREDENTIALS = re.compile(
    r"unauthori[sz]ed|unauthenticated|not authenticated|forbidden|access denied|\b40[13]\b", re.I
)
_CREDENTIALS_HINT = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; then the same command goes on"
)
_LASTING = {"INVALID_PARAMETER_VALUE", "ENDPOINT_NOT_FOUND", "BAD_REQUEST"}
"""MLflow's answers that another attempt would get again."""


def set_environment(timeout_s: int) -> None:
    """Set MLflow's switches: pickle and telemetry always off, time-outs short unless the user chose their own."""
    os.environ.update(_OURS)
    for name, value in {**_RETRIES, _LIMIT: str(timeout_s)}.items():
        os.environ.setdefault(name, value)


def connect(config: TrackingConfig, store_root: Path) -> MlflowClient:
    """Return a client of the tracking store and registry in force.

    A SQLite database that does not exist yet is created here (seconds), by one process at a time; a process that is
    killed meanwhile leaves none.
    """
    set_environment(config.timeout_s)
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    from pipelines.tracking.mlflow_client import Client

    uri = resolve_uri(config, store_root)
    if not uri.startswith(_SQLITE):
        return Client(uri, uri)
    # Imported before the lock is taken: on a busy machine that takes longer than the work, and others wait meanwhile.
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    store_root.mkdir(parents=True, exist_ok=True)
    what, leases = "MLflow's database", lease_folder(uri, store_root)
    with lock.hold(leases / "mlflow.lock", what=what, wait_s=MIGRATION_WAIT_S):
        _ensure_database(Path(uri.removeprefix(_SQLITE)))
        client = Client(uri, uri)
        client.get_experiment("0")
    return client


def _ensure_database(path: Path) -> None:
    """Lay out MLflow's SQLite database where there is none, or where one was cut off before it held anything."""
    if path.is_file():
        try:
            _open_database(path)
        except Exception:  # whatever MLflow, alembic or SQLite say of a database that is half laid out
            _close_database(path)
            if not sqlite_file.is_empty(path, _WORK, settled_s=_SETTLED_S):
                raise
            log.warning("%s was left half laid out, and empty; it is now %s", path, sqlite_file.set_aside(path))
    if not path.is_file():
        sqlite_file.create(path, _lay_out)


def _lay_out(path: Path) -> None:
    _open_database(path)
    _close_database(path)


def _open_database(path: Path) -> None:
    """Let MLflow open a SQLite database, which lays out a new one (100 migrations, seconds)."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(f"{_SQLITE}{path}", (path.parent / "mlartifacts").as_uri())


def _close_database(path: Path) -> None:
    """Close what MLflow's table of engines keeps open: the file is about to be renamed."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore._get_or_create_engine(f"{_SQLITE}{path}").dispose()  # noqa: SLF001 - nothing public closes it


def lease_folder(uri: str, store_root: Path) -> Path:
    """Return where leases on an MLflow lie: beside a SQLite database, which stores may share; else in the store."""
    database = Path(uri.removeprefix(_SQLITE))
    return (database.parent if uri.startswith(_SQLITE) else store_root) / "leases"


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


def upload(
    client: MlflowClient, artifact_uri: str, files: Mapping[str, Path], *, at_once: int = _UPLOADS_AT_ONCE
) -> None:
    """Send files to an MLflow run, a few at a time: to a slow server each costs a request.

    Args:
        client: connection to MLflow.
        artifact_uri: where the run keeps its files; `client.log_artifact` would ask for it anew for each.
        files: name in MLflow -> file; both end alike.
        at_once: how many files are on their way at a time.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    repository = get_artifact_repository(artifact_uri, tracking_uri=client.tracking_uri)

    def send(item: tuple[str, Path]) -> None:
        repository.log_artifact(str(item[1]), item[0].rpartition("/")[0] or None)

    size = sum(path.stat().st_size for path in files.values())
    with _time_for(size), ThreadPoolExecutor(at_once, thread_name_prefix="mlflow-upload") as pool:
        list(pool.map(send, files.items()))


@contextlib.contextmanager
def _time_for(size: int) -> Iterator[None]:
    """Let requests of the block take as much longer as so many bytes take on a slow line, and the server to keep them.

    MLflow has one limit for all requests, in an environment variable, so blocks side by side share the longest.
    """
    seconds = size // _SLOWEST_BYTES_PER_S
    _waiting.append(seconds)
    _set_limit()
    try:
        yield
    finally:
        _waiting.remove(seconds)
        _set_limit()


def _set_limit() -> None:
    with _limit_lock:
        usual = _usual_limit.setdefault("seconds", int(os.environ.get(_LIMIT) or TrackingConfig().timeout_s))
        os.environ[_LIMIT] = str(usual + max(_waiting, default=0))
        if not _waiting:
            del _usual_limit["seconds"]  # what the environment says by then counts


@contextlib.contextmanager
def reachable(uri: str, *, what: str) -> Iterator[None]:
    """Turn every failure of MLflow inside the block into an error that says what to do.

    Raises:
        TransientError: MLflow did not answer, or answered that it cannot now.
        ConfigError: MLflow understood and refused; wrong credentials are called that.
    """
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except IngotError:
        raise
    except (MlflowException, RequestException, SQLAlchemyError, ConnectionError) as error:
        if refuses_credentials(error):
            raise ConfigError(f"{what}: {explain(error, uri)}", hint=_CREDENTIALS_HINT) from error
        if getattr(error, "error_code", None) in _LASTING:
            raise ConfigError(
                f"{what}: MLflow at {redact(uri)} refused: {redact(_first_line(error))}",
                hint="check tracking.uri",
            ) from error
        raise TransientError(
            f"{what}: tracking pending, {explain(error, uri)}",
            hint="every artifact is published; when MLflow answers again, `ingot sync` and `ingot promote` finish it",
        ) from error


def explain(error: BaseException, uri: str) -> str:
    """Return in one line, without secrets, what went wrong with MLflow; wrong credentials are called that."""
    failed = "refused the credentials" if refuses_credentials(error) else "failed"
    return f"MLflow at {redact(uri)} {failed}: {redact(_first_line(error))}"


def refuses_credentials(error: BaseException) -> bool:
    """Return whether MLflow, or a proxy before it, answered 401 or 403."""
    answer = getattr(error, "response", None)  # of requests, where artifacts go over HTTP
    if answer is not None:
        return answer.status_code in {401, 403}
    told = getattr(error, "json", None)  # of MLflow: an answer in JSON, whose status it drops
    if isinstance(told, dict) and "error_code" not in told:
        return _SAYS_CREDENTIALS.search(str(told)) is not None
    return getattr(error, "error_code", None) in _CREDENTIAL_CODES


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
