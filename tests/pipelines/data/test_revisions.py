"""Versions of the corpus in git, and what two of them have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipelines.core.errors import ConfigError
from pipelines.data import recording, revisions, versioning
from pipelines.data.config import DataConfig, PrepareConfig

HERE = DataConfig()


def write(folder: Path, name: str, texts: dict[str, str]) -> None:
    (folder / "data").mkdir(exist_ok=True)
    lines = [json.dumps({"id": i, "text": text, "source": i[0]}) for i, text in texts.items()]
    (folder / "data" / name).unlink(missing_ok=True)
    (folder / "data" / name).write_text("".join(line + "\n" for line in lines))


def characters(texts: Sequence[str]) -> list[int]:
    return [len(text) for text in texts]


@pytest.fixture
def two(clone: Path, dvc_command: Callable[..., str], commit: Callable[[Path, str], None]) -> Path:
    """A clone with two versions of a corpus, the second not committed."""
    write(clone, "same.jsonl", {"s1": "not read at all"})
    write(clone, "texts.jsonl", {"a1": "stays", "a2": "is edited", "b1": "goes", "b2": "gets another id"})
    recording.add(HERE, clone)
    commit(clone, "first")
    dvc_command(clone, "git", "tag", "v1")
    write(clone, "texts.jsonl", {"a1": "stays", "a2": "was edited", "b3": "gets another id"})
    write(clone, "more.jsonl", {"c1": "comes"})
    recording.add(HERE, clone)
    return clone


def test_log_and_diff_know_the_versions_and_what_became_of_each_document(two: Path) -> None:
    rows = revisions.log(HERE, two, 20)
    assert [row["subject"] for row in rows] == ["not committed", "first", "corpus"]
    assert [row["files"] for row in rows] == [3, 2, 4]
    assert rows[0]["hash"] == versioning.data_hash(HERE, two)
    assert rows[1]["hash"] == versioning.data_hash(DataConfig(rev="v1"), two)
    assert "tag: v1" in rows[1]["names"]
    assert [row["subject"] for row in revisions.log(DataConfig(rev="v1"), two, 1)] == ["first"]

    found = revisions.diff(HERE, PrepareConfig(), two, "v1", None, characters)
    assert found["files"] == {"added": 1, "removed": 0, "changed": 1, "same": 1}
    assert {row["documents"]: (row["number"], row["bytes"], row["tokens"]) for row in found["documents"]} == {
        "added": (1, 5, 5),
        "removed": (1, 4, 4),
        "changed": (1, 10, 10),
        "renamed": (1, 15, 15),
    }
    assert found["samples"] == {"added": ["c1"], "removed": ["b1"], "changed": ["a2"], "renamed": ["b3"]}
    assert {row["source"]: row["tokens more"] for row in found["sources"]} == {"a": 1, "b": -4, "c": 5}
    backwards = revisions.diff(HERE, PrepareConfig(), two, None, "v1")
    assert {row["documents"]: row["number"] for row in backwards["documents"]} == {
        "added": 1, "removed": 1, "changed": 1, "renamed": 1
    }  # fmt: skip
    assert not (two / ".dvc" / "tmp" / "ingot-diff").exists()


def test_a_revision_that_is_not_there_and_a_project_without_git_are_named(clone: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.rev = 'v9'"):
        revisions.diff(HERE, PrepareConfig(), clone, "v9", None)
    with pytest.raises(ConfigError, match="not a git repository"):
        revisions.log(HERE, tmp_path, 1)
