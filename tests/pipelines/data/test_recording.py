"""How a corpus is recorded and updated, at every kind of `data.path`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.core.settings import PROJECT
from pipelines.data import recording, versioning
from pipelines.data.config import DataConfig

HERE = DataConfig()


def line(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


def test_a_corpus_is_brought_anew_from_where_it_was_imported_from(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "elsewhere"
    source.mkdir()
    (source / "a.jsonl").write_text(line("one"))
    (clone / "data.dvc").unlink()
    monkeypatch.chdir(tmp_path)
    recording.import_url(HERE, clone, "elsewhere")
    assert "source: ../elsewhere" in (clone / "data.dvc").read_text()
    monkeypatch.chdir("/")  # the project is moved or cloned, not the folder that was typed in
    (source / "a.jsonl").write_text(line("two"))
    (source / "b.jsonl").write_text(line("three"))
    updated = recording.update(HERE, clone)
    assert (updated["added"], updated["changed"]) == ("b.jsonl", "a.jsonl")
    assert (clone / "data" / "a.jsonl").read_text() == line("two")
    (clone / "data" / "a.jsonl").unlink()
    (clone / "data" / "a.jsonl").write_text(line("mine"))
    with pytest.raises(IntegrityError, match=r"a\.jsonl: expected md5"):
        recording.update(HERE, clone)
    assert recording.update(HERE, clone, force=True)["hash"] == updated["hash"]
    shutil.rmtree(source)
    with pytest.raises(ConfigError, match="elsewhere does not exist"):
        recording.update(HERE, clone)
    assert versioning.verify(HERE, clone).hash == updated["hash"]


def test_a_corpus_without_a_source_has_nothing_to_be_updated_from(clone: Path) -> None:
    with pytest.raises(ConfigError, match="names no source"):
        recording.update(HERE, clone)


@pytest.mark.parametrize("said", ["corpora/en", "./corpora/en/", "{project}/corpora/en/"])
def test_a_nested_folder_is_the_same_however_it_is_written(clone: Path, said: str) -> None:
    config = DataConfig.model_validate({"path": said.format(project=clone)}, context={PROJECT: clone})
    assert (config.path, config.tracked_by) == ("corpora/en", "corpora/en.dvc")


def test_a_folder_of_the_home_directory_is_one_of_the_project_where_that_lies_around_it(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(clone.parent))
    config = DataConfig.model_validate({"path": f"~/{clone.name}/texts"}, context={PROJECT: clone})
    assert config.path == "texts"


def test_a_nested_folder_is_recorded_pulled_and_checked_out_at_a_revision(
    clone: Path, tmp_path: Path, commit: object
) -> None:
    config = DataConfig(path="corpora/en")
    (clone / "corpora" / "en").mkdir(parents=True)
    (clone / "corpora" / "en" / "a.jsonl").write_text(line("nested"))
    added = recording.add(config, clone)
    assert (clone / "corpora" / "en.dvc").is_file()
    versioning.push(config, clone, into_git=True)
    commit(clone, "nested")  # type: ignore[operator]
    shutil.rmtree(clone / "corpora" / "en")
    assert versioning.pull(config, clone) == {
        "hash": added["hash"],
        "files": 1,
        "path": str(clone / "corpora" / "en"),
    }
    old = versioning.checkout_corpus(config.model_copy(update={"rev": "HEAD"}), tmp_path / "scratch", clone)
    assert (old.path / "a.jsonl").read_text() == line("nested")


def test_a_corpus_of_one_file_is_imported_updated_and_checked_out_at_a_revision(
    clone: Path, tmp_path: Path, commit: object
) -> None:
    config = DataConfig(path="texts.jsonl")
    (tmp_path / "mine.jsonl").write_text(line("one"))
    imported = recording.import_url(config, clone, str(tmp_path / "mine.jsonl"))
    assert imported["files"] == 1
    assert (clone / "texts.jsonl").read_text() == line("one")
    assert versioning.verify(config, clone).hash == imported["hash"]
    commit(clone, "one file")  # type: ignore[operator]
    (tmp_path / "mine.jsonl").write_text(line("two"))
    assert recording.update(config, clone)["changed"] == "texts.jsonl"
    old = versioning.checkout_corpus(config.model_copy(update={"rev": "HEAD"}), tmp_path / "scratch", clone)
    assert old.path.read_text() == line("one")
    assert (clone / "texts.jsonl").read_text() == line("two")
