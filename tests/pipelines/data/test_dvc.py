"""What DVC says when it fails, with real DVC and git: each cause has its own class and a way out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.core.errors import ConfigError, DiskFullError, TransientError
from pipelines.data import dvc, recording, versioning
from pipelines.data.config import DataConfig

HERE = DataConfig()


@pytest.fixture
def recorded(clone: Path) -> Path:
    """A clone whose corpus is one small file, in the cache and not in a remote."""
    (clone / "data").mkdir()
    (clone / "data" / "a.jsonl").write_text('{"text": "a"}\n')
    recording.add(HERE, clone)
    return clone


def test_a_project_without_a_remote_is_told_to_name_one(recorded: Path) -> None:
    (recorded / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    with pytest.raises(ConfigError, match="no DVC remote") as caught:
        versioning.push(HERE, recorded)
    assert "dvc remote add -d" in str(caught.value.hint)
    assert "no DVC remote" in versioning.status(HERE, recorded)["remote"]
    (recorded / ".dvc" / "config").write_text("[core]\n    remote = gone\n")
    with pytest.raises(ConfigError, match="remote 'gone' doesn't exist"):
        versioning.push(HERE, recorded)


def test_a_merge_conflict_is_named_by_every_verb_before_dvc_runs(recorded: Path) -> None:
    (recorded / "data.dvc").write_text("<<<<<<< HEAD\nouts:\n=======\n>>>>>>> x\n")
    for verb in (versioning.pull, versioning.push, versioning.status, recording.add, recording.update):
        with pytest.raises(ConfigError, match="unresolved merge conflict") as caught:
            verb(HERE, recorded)  # type: ignore[operator]
        assert "git checkout --ours data.dvc" in str(caught.value.hint)


def test_what_is_missing_of_git_and_dvc_is_named(recorded: Path) -> None:
    shutil.rmtree(recorded / ".git")
    with pytest.raises(ConfigError, match="no git repository") as caught:
        versioning.pull(HERE, recorded)
    assert "git init" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="is no git repository, so that it has no revisions") as caught:
        versioning.data_hash(DataConfig(rev="v1"), recorded)
    assert "git init" in str(caught.value.hint)
    shutil.rmtree(recorded / ".dvc")
    with pytest.raises(ConfigError, match=r"no folder \.dvc") as caught:
        versioning.pull(HERE, recorded)
    assert "dvc init" in str(caught.value.hint)


def test_a_corpus_that_dvc_imported_is_updated_and_a_source_that_is_gone_is_named(
    clone: Path, tmp_path: Path, dvc_command: Callable[..., str]
) -> None:
    source = tmp_path / "elsewhere"
    source.mkdir()
    (source / "a.jsonl").write_text('{"text": "a"}\n')
    (clone / "data.dvc").unlink()
    dvc_command(clone, "dvc", "import-url", "--quiet", str(source), "data")
    (source / "b.jsonl").write_text('{"text": "b"}\n')
    assert recording.update(HERE, clone)["added"] == "b.jsonl"
    shutil.rmtree(source)
    with pytest.raises(ConfigError, match="what the corpus was imported from is gone") as caught:
        recording.update(HERE, clone)
    assert str(source) in caught.value.message


def test_pull_does_not_put_files_in_the_place_of_a_link(recorded: Path, tmp_path: Path) -> None:
    shutil.move(recorded / "data", tmp_path / "disk")
    (recorded / "data").symlink_to(tmp_path / "disk")
    with pytest.raises(ConfigError, match="DVC records no links"):
        versioning.pull(HERE, recorded, force=True)
    assert (recorded / "data").is_symlink()


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("ERROR: unexpected error - [Errno 28] No space left on device: '/x'", DiskFullError),
        ("ERROR: failed to connect to s3 (a/b) - Connect timeout on endpoint URL", TransientError),
        ("ERROR: unexpected error - An error occurred (SlowDown) when calling", TransientError),
        ("ERROR: failed to connect to s3 (a/b) - Unable to locate credentials", ConfigError),
        ("ERROR: something that nobody has seen before", TransientError),
    ],
)
def test_words_of_dvc_that_a_test_cannot_provoke_have_their_class(said: str, kind: type, tmp_path: Path) -> None:
    found = dvc._error(tmp_path, ("pull", "data.dvc"), said)
    assert type(found) is kind
    assert said in found.message
    assert found.hint
