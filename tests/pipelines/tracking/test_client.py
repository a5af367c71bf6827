"""The door to MLflow: what is set before its import, and how its faults are told apart."""

from __future__ import annotations

import os

import pytest

from pipelines.core.errors import ConfigError, GateRefused, TransientError
from pipelines.tracking.client import reachable, set_environment

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


def test_our_own_errors_pass_unchanged() -> None:
    with pytest.raises(GateRefused, match="too slow"), reachable("http://host", what="the registry"):
        raise GateRefused("too slow")


def test_a_fault_of_ours_is_not_taken_for_one_of_mlflow() -> None:
    with pytest.raises(ZeroDivisionError), reachable("http://host", what="the registry"):
        raise ZeroDivisionError
