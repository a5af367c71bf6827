"""Stages: what enters their identity, and what their source digest sees."""

from __future__ import annotations

import pytest
from pydantic import Field

from pipelines.core import fingerprint
from pipelines.core.settings import NOT_IDENTITY, Settings
from pipelines.core.stage import Stage


class Config(Settings):
    bits: int = Field(8, description="Bits.")
    threads: int = Field(1, description="Threads.", json_schema_extra=NOT_IDENTITY)


def test_identity_holds_name_version_settings_and_inputs_and_nothing_else() -> None:
    one = Stage("compress", version=3, entry="a:b")
    assert one.identity(Config(threads=9), {"model": "ab"}) == {
        "stage": "compress",
        "version": 3,
        "config": {"bits": 8},
        "inputs": {"model": "ab"},
    }


@pytest.mark.parametrize(
    "other",
    [
        Stage("evaluate", version=1, entry="a:b").identity(Config(), {"model": "ab"}),
        Stage("compress", version=2, entry="a:b").identity(Config(), {"model": "ab"}),
        Stage("compress", version=1, entry="a:b").identity(Config(bits=4), {"model": "ab"}),
        Stage("compress", version=1, entry="a:b").identity(Config(), {"model": "cd"}),
    ],
)
def test_each_part_of_the_identity_changes_the_fingerprint(other: dict[str, object]) -> None:
    base = Stage("compress", version=1, entry="a:b").identity(Config(), {"model": "ab"})
    assert fingerprint.digest(other) != fingerprint.digest(base)
