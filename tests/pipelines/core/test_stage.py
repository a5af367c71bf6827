"""Stages: what enters their identity, and what their source digest sees."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from pipelines.core import fingerprint, stage
from pipelines.core.settings import NOT_IDENTITY, Settings
from pipelines.core.stage import Stage


class Config(Settings):
    bits: int = Field(8, description="Bits.")
    threads: int = Field(1, description="Threads.", json_schema_extra=NOT_IDENTITY)


def test_identity_holds_name_version_settings_and_inputs_and_nothing_else() -> None:
    one = Stage("compress", version=3, entry="a:b", sources=())
    assert one.identity(Config(threads=9), {"model": "ab"}) == {
        "stage": "compress",
        "version": 3,
        "config": {"bits": 8},
        "inputs": {"model": "ab"},
    }


@pytest.mark.parametrize(
    "other",
    [
        Stage("evaluate", version=1, entry="a:b", sources=()).identity(Config(), {"model": "ab"}),
        Stage("compress", version=2, entry="a:b", sources=()).identity(Config(), {"model": "ab"}),
        Stage("compress", version=1, entry="a:b", sources=()).identity(Config(bits=4), {"model": "ab"}),
        Stage("compress", version=1, entry="a:b", sources=()).identity(Config(), {"model": "cd"}),
    ],
)
def test_each_part_of_the_identity_changes_the_fingerprint(other: dict[str, object]) -> None:
    base = Stage("compress", version=1, entry="a:b", sources=()).identity(Config(), {"model": "ab"})
    assert fingerprint.digest(other) != fingerprint.digest(base)


def test_the_source_digest_sees_content_names_and_order_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "CHECKOUT", tmp_path)
    (tmp_path / "part").mkdir()
    seen = []
    for name, text in [("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", "x = 2"), ("notes.md", "text")]:
        (tmp_path / "part" / name).write_text(text)
        stage._source_digest.cache_clear()
        seen.append(Stage("compress", version=1, entry="a:b", sources=("part",)).source_digest())
    stage._source_digest.cache_clear()
    assert len(set(seen[:3])) == 3
    assert seen[3] == seen[2]
