"""Errors: their text, and the exit codes that users and schedulers rely on."""

from __future__ import annotations

import pytest

from pipelines.core import errors
from pipelines.core.errors import BY_EXIT_CODE, IngotError


def every_error() -> list[type[IngotError]]:
    return [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, IngotError)]


def test_the_exit_codes_are_the_documented_ones() -> None:
    assert {error.__name__: error.exit_code for error in every_error()} == {
        "IngotError": 1,
        "ConfigError": 2,
        "IntegrityError": 3,
        "TransientError": 4,
        "DiskFullError": 4,
        "NumericError": 5,
        "LockedError": 6,
        "LockLost": 6,
        "GateRefused": 7,
        "DataRefused": 8,
        "Preempted": 75,
    }


def test_an_exit_code_leads_back_to_its_error() -> None:
    assert {error.exit_code: error for error in every_error() if error.__base__ is IngotError} == BY_EXIT_CODE


@pytest.mark.parametrize("error", every_error())
def test_the_hint_stands_on_a_line_of_its_own(error: type[IngotError]) -> None:
    assert str(error("shard 3 is damaged")) == "shard 3 is damaged"
    assert str(error("shard 3 is damaged", hint="run `ingot data pull`")).splitlines() == [
        "shard 3 is damaged",
        "  -> run `ingot data pull`",
    ]
