"""The door to MLflow: what is set before its import, and how its faults are told apart."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.core.errors import ConfigError, GateRefused, TransientError
from pipelines.tracking import client as mlflow_client
from pipelines.tracking.client import connect, explain, reachable, set_environment
from pipelines.tracking.config import TrackingConfig

HALFWAY_BYTES = 200_000
"""Of the 950 kB that MLflow's database has after its migrations."""
NAMES = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION")


def test_requests_are_short_and_pickle_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    set_environment(7)
    assert [os.environ[name] for name in NAMES] == ["7", "1", "false"]


def test_the_users_own_time_outs_stay_and_pickle_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("99", "5", "true"), strict=True):
        monkeypatch.setenv(name, value)
    set_environment(7)
    assert [os.environ[name] for name in NAMES] == ["99", "5", "false"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("TEMPORARILY_UNAVAILABLE", TransientError),
        ("INTERNAL_ERROR", TransientError),
        ("REQUEST_LIMIT_EXCEEDED", TransientError),
        ("PERMISSION_DENIED", ConfigError),
        ("UNAUTHENTICATED", ConfigError),
    ],
)
def test_what_may_pass_is_told_from_what_stays(code: str, expected: type[Exception]) -> None:
    from mlflow.exceptions import RestException

    with pytest.raises(expected, match="the reason"), reachable("http://host", what="the registry"):
        raise RestException({"error_code": code, "message": "the reason"})


def answered(status: int, body: str) -> Exception:
    """Return what MLflow's client makes of an answer."""
    import requests
    from mlflow.utils.rest_utils import verify_rest_response

    response = requests.Response()
    response.status_code, response._content = status, body.encode()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the kind is what is asked
        verify_rest_response(response, "/api/2.0/mlflow/runs/create")
    return caught.value


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, "You are not authenticated. Please see the documentation."),
        (403, "Permission denied"),
        (401, '{"error_code": "UNAUTHENTICATED", "message": "no"}'),
        (401, '{"detail": "Unauthorized"}'),
        (403, '{"message": "Forbidden"}'),
    ],
)
def test_wrong_credentials_are_called_that(status: int, body: str) -> None:
    error = answered(status, body)
    with pytest.raises(ConfigError, match="refused the credentials") as caught, reachable("http://h", what="promote"):
        raise error
    assert "MLFLOW_TRACKING_PASSWORD" in str(caught.value)
    assert "refused the credentials" in explain(error, "http://h")


@pytest.mark.parametrize(("status", "body"), [(502, "Bad Gateway"), (503, '{"message": "try later"}')])
def test_a_server_in_trouble_is_not_called_wrong_credentials(status: int, body: str) -> None:
    assert "refused the credentials" not in explain(answered(status, body), "http://h")


def test_our_own_errors_pass_unchanged() -> None:
    with pytest.raises(GateRefused, match="too slow"), reachable("http://host", what="the registry"):
        raise GateRefused("too slow")


def test_a_fault_of_ours_is_not_taken_for_one_of_mlflow() -> None:
    with pytest.raises(ZeroDivisionError), reachable("http://host", what="the registry"):
        raise ZeroDivisionError


@pytest.mark.slow
def test_a_database_whose_migrations_were_killed_stops_no_later_run(tmp_path: Path) -> None:
    """Killed halfway it leaves no database; one that an earlier version left half laid out is replaced."""
    program = (
        "import sys; from pathlib import Path; from pipelines.tracking.client import connect;"
        "from pipelines.tracking.config import TrackingConfig;"
        "connect(TrackingConfig(), Path(sys.argv[1]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    maker = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment)
    half_laid_out, database = tmp_path / "mlflow.db.new", tmp_path / "mlflow.db"
    while maker.poll() is None and not (half_laid_out.exists() and half_laid_out.stat().st_size > HALFWAY_BYTES):
        time.sleep(0.002)
    maker.kill()
    assert maker.wait() == -signal.SIGKILL
    assert not database.exists()

    shutil.copyfile(half_laid_out, database)
    os.utime(database, (0, 0))
    client = connect(TrackingConfig(uri=f"sqlite:///{database}"), tmp_path)
    assert client.get_experiment("0").name == "Default"
    assert [path.suffix.partition("-")[0] for path in tmp_path.glob("mlflow.db.*")] == [".unusable"]


def test_an_upload_has_time_by_its_size_and_other_requests_get_their_limit_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")

    def limit() -> int:
        return int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])

    with mlflow_client._time_for(1 << 30):
        assert limit() == 7 + 4096
        with mlflow_client._time_for(1 << 20):
            assert limit() == 7 + 4096
        assert limit() == 7 + 4096
    assert limit() == 7
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    with mlflow_client._time_for(1000):
        assert limit() == 3
