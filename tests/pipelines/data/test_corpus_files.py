"""The files of a corpus are those that DVC records; what it cannot follow is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.data import corpus_files, reader, recording, versioning
from pipelines.data.config import DataConfig

HERE = DataConfig()
LINE = b'{"text": "one"}\n'
FILES = (
    *("a.jsonl", "b.bak", "keep.bak", "drafts/c.jsonl", "old/drafts/d.jsonl", ".DS_Store", "old/.DS_Store"),
    *("old/e.tmp", "old/f.tmp", "sub/g.jsonl", ".git/config"),
)


@pytest.fixture
def ignoring(clone: Path) -> Path:
    """A clone with files in its corpus that `.dvcignore` speaks of."""
    for name in FILES:
        (clone / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / "data" / name).write_bytes(LINE)
    (clone / ".dvcignore").write_text(
        "# comment\n.DS_Store\n*.bak\n!keep.bak\n/data/drafts/\nold/*.tmp\ndata/old/f.tmp\n"
    )
    return clone


def test_the_files_are_those_that_dvc_records(ignoring: Path) -> None:
    """DVC itself is the reference."""
    recording.add(HERE, ignoring)
    found = versioning.verify(HERE, ignoring)
    assert found.md5 == versioning.listing_of(found.hash, ignoring)
    assert set(found.md5) == {"a.jsonl", "keep.bak", "old/drafts/d.jsonl", "old/e.tmp", "sub/g.jsonl"}
    assert len(list(reader.read(found.path, md5=found.md5))) == len(found.md5)


def test_an_ignore_file_within_the_corpus_is_refused_before_dvc_does(ignoring: Path) -> None:
    (ignoring / "data" / "sub" / ".dvcignore").write_text("g.jsonl\n")
    with pytest.raises(IntegrityError, match=r"sub/\.dvcignore: DVC records no folder with an ignore file") as caught:
        recording.add(HERE, ignoring)
    assert str(ignoring / ".dvcignore") in str(caught.value.hint)


def test_a_file_that_is_ignored_later_is_missing_and_one_that_no_longer_is_is_new(ignoring: Path) -> None:
    recording.add(HERE, ignoring)
    rules = (ignoring / ".dvcignore").read_text()
    (ignoring / ".dvcignore").write_text(rules + "a.jsonl\n")
    with pytest.raises(IntegrityError, match=r"a\.jsonl: expected md5 .*found \(missing\)"):
        versioning.verify(HERE, ignoring)
    (ignoring / ".dvcignore").write_text(rules.replace("*.bak", ""))
    with pytest.raises(IntegrityError, match=r"b\.bak: expected md5 \(none\)"):
        versioning.verify(HERE, ignoring)


def test_another_revision_is_not_judged_by_the_present_ignore_file(
    clone: Path, tmp_path: Path, commit: Callable[[Path, str], None]
) -> None:
    (clone / "data").mkdir()
    (clone / "data" / "a.jsonl").write_bytes(LINE)
    recording.add(HERE, clone)
    commit(clone, "one")
    (clone / ".dvcignore").write_text("*.jsonl\n")
    found = versioning.checkout_corpus(DataConfig(rev="HEAD"), tmp_path / "scratch", clone)
    assert set(found.md5) == {"a.jsonl"}


@pytest.mark.parametrize(("target", "said"), [("more", "links to folders"), ("nowhere", "links to nothing")])
def test_links_that_dvc_leaves_out_are_refused_by_name(clone: Path, tmp_path: Path, target: str, said: str) -> None:
    (clone / "data").mkdir()
    (clone / "data" / "a.jsonl").write_bytes(LINE)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.jsonl").write_bytes(LINE)
    (clone / "data" / "linked").symlink_to(tmp_path / target)
    for step in (
        lambda: recording.add(HERE, clone),
        lambda: versioning.verify(HERE, clone),
        lambda: list(reader.read(clone / "data")),
    ):
        with pytest.raises(IntegrityError, match=f"data/linked: {said}"):
            step()
    (clone / ".dvcignore").write_text("linked\n")
    assert corpus_files.files(clone / "data", clone) == [clone / "data" / "a.jsonl"]


def test_a_linked_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "real.jsonl").write_bytes(LINE)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert len(list(reader.read(tmp_path / "c"))) == 1


def test_a_corpus_that_is_a_link_itself_is_a_slip_with_a_way_out(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (clone / "data").symlink_to(tmp_path / "disk")
    with pytest.raises(ConfigError, match="DVC records no links") as caught:
        recording.add(HERE, clone)
    assert f"ingot data import {tmp_path / 'disk'}" in str(caught.value.hint)


def test_the_last_pattern_decides() -> None:
    names = ["a.jsonl", "b/a.jsonl", "b/c.txt", "LICENSE"]
    assert corpus_files.selected(names, ["*"]) == names
    assert corpus_files.selected(names, ["*", "!b/", "c.txt"]) == ["a.jsonl", "b/c.txt", "LICENSE"]
    assert corpus_files.selected(names, ["/*.jsonl"]) == ["a.jsonl"]
