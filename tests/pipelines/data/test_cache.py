"""The DVC cache: what no version needs goes, what one needs stays, and the work tree can share it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.core.errors import ConfigError
from pipelines.data import cache, recording, versioning
from pipelines.data.config import DataConfig

HERE = DataConfig()


def put(clone: Path, text: str) -> None:
    (clone / "data").mkdir(exist_ok=True)
    (clone / "data" / "a.jsonl").unlink(missing_ok=True)
    (clone / "data" / "a.jsonl").write_text(text)
    recording.add(HERE, clone)


def test_what_a_commit_names_stays_and_what_nobody_names_goes(
    clone: Path, tmp_path: Path, commit: Callable[[Path, str], None]
) -> None:
    put(clone, "committed " * 100)
    commit(clone, "one")
    put(clone, "recorded, then replaced " * 100)
    put(clone, "in the work tree")
    (clone / ".dvc" / "tmp" / "ingot-import").mkdir()
    found = cache.unused(clone, "commits")
    assert (found["objects"], found["folders"]) == (2, 1)
    assert found["bytes"] > 2000
    cache.collect(clone, "commits")
    assert cache.unused(clone, "commits") == {"objects": 0, "folders": 0, "bytes": 0}
    old = versioning.checkout_corpus(DataConfig(rev="HEAD"), tmp_path / "scratch", clone)
    assert (old.path / "a.jsonl").read_text() == "committed " * 100
    assert cache.unused(clone, "work-tree")["objects"] == 2


def test_what_is_kept_is_one_of_four_and_needs_git_but_for_the_last(clone: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such choice") as caught:
        cache.unused(clone, "everything")
    assert "commits, branches, tags, work-tree" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="no git repository"):
        cache.unused(tmp_path, "commits")


def test_the_work_tree_shares_the_disk_with_the_cache_once_it_is_linked(clone: Path) -> None:
    put(clone, "text " * 100)
    assert "hardlink" in cache.link_types(clone)[1]
    shared = "reflink" in cache.link_types(clone)[1]
    assert cache.takes_twice(clone) is not shared
    cache.link(HERE, clone)
    assert not cache.takes_twice(clone)
    assert shared or (clone / "data" / "a.jsonl").stat().st_nlink == 2
    assert versioning.verify(HERE, clone).hash == versioning.data_hash(HERE, clone)
    put(clone, "another text")  # replacing a linked file does not touch the cache
    assert versioning.verify(HERE, clone).hash == versioning.data_hash(HERE, clone)
