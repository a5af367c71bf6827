"""The DVC remote on S3: a real server (SeaweedFS) over the network of this machine, and what can go wrong with it."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, IntegrityError, TransientError
from pipelines.core.store import LocalStore
from pipelines.data import recording, remote, versioning
from pipelines.data.config import DataConfig
from tests.s3_server import S3Server

HERE = DataConfig()


@pytest.fixture
def on_s3(clone: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with a corpus of its own, whose default remote is on S3."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    (clone / ".dvc" / "config.local").write_text(
        "[core]\n    remote = store\n['remote \"store\"']\n"
        f"    url = s3://corpus/ingot\n    endpointurl = {s3.address}\n    verify = true\n",
        encoding="utf-8",
    )
    (clone / "data").mkdir()
    for name in ("a", "b"):
        (clone / "data" / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n' * 1000, encoding="utf-8")
    return clone


def test_a_corpus_pushed_to_s3_comes_back_the_same_and_an_unpushed_one_is_missing(on_s3: Path) -> None:
    recording.add(HERE, on_s3)
    before = versioning.verify(HERE, on_s3)
    versioning.push(HERE, on_s3)
    forget(on_s3)
    versioning.ensure(HERE, on_s3)
    assert versioning.verify(HERE, on_s3) == before
    (on_s3 / "data" / "new.jsonl").write_text('{"text": "never pushed"}\n', encoding="utf-8")
    recording.add(HERE, on_s3)
    forget(on_s3)
    with pytest.raises(IntegrityError, match="lacks an object") as caught:
        versioning.pull(HERE, on_s3)
    assert "ingot data push" in str(caught.value.hint)
    assert "infra/dvc-remote" not in caught.value.message  # the folder that is no remote of this project


def test_what_is_wrong_with_a_server_has_its_own_class_and_words(
    on_s3: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording.add(HERE, on_s3)
    local = on_s3 / ".dvc" / "config.local"
    right = local.read_text()
    with monkeypatch.context() as changed:
        changed.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(ConfigError, match=r"(?s)no access to the remote.*Forbidden") as refused:
            versioning.push(HERE, on_s3)
        assert "AWS_ACCESS_KEY_ID" in str(refused.value.hint)
        assert "no access" in versioning.status(HERE, on_s3)["remote"]  # `dvc status` says that all is well
    local.write_text(right.replace("s3://corpus/ingot", "s3://no-such-bucket/ingot"))
    shutil.rmtree(on_s3 / ".dvc" / "cache")
    with pytest.raises(ConfigError, match="bucket does not exist"):
        versioning.pull(HERE, on_s3, force=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    local.write_text(right.replace(s3.address, f"http://127.0.0.1:{port}"))
    with pytest.raises(TransientError, match="the remote does not answer") as down:
        versioning.pull(HERE, on_s3, force=True)
    assert str(port) in down.value.message
    assert "infra/dvc-remote" not in down.value.message


def test_a_prepared_corpus_is_pushed_and_pulled_by_its_fingerprint(
    on_s3: Path, prepared: Artifact, tmp_path: Path
) -> None:
    key = prepared.manifest.fingerprint
    second = LocalStore(tmp_path / "second")
    with pytest.raises(ConfigError, match="has no prepared corpus") as caught:
        remote.pull_prepared(second, key, "attempt", on_s3)
    assert "ingot data push --prepared" in str(caught.value.hint)
    assert remote.push_prepared(prepared, on_s3)["sent"] == "all of it"
    assert remote.push_prepared(prepared, on_s3)["sent"] == "it was there"
    there = remote.pull_prepared(second, key, "attempt", on_s3)
    assert (there.digest, there.manifest) == (prepared.digest, prepared.manifest)
    assert second.find("prepare", key) == there
    there.verify()
    assert remote.pull_prepared(second, key, "attempt", on_s3) == there
    name = next(name for name in prepared.manifest.files if name.startswith("documents/"))
    with remote.reached(on_s3) as (system, root):
        system.pipe_file(f"{root}/ingot/prepare/{key[:32]}/{name}", b"damaged")
    with pytest.raises(IntegrityError, match=f"{name} does not match its manifest"):
        remote.pull_prepared(LocalStore(tmp_path / "third"), key, "attempt", on_s3)
    assert LocalStore(tmp_path / "third").find("prepare", key) is None


def test_nothing_is_pushed_into_a_folder_that_git_commits_unasked(clone: Path, tmp_path: Path) -> None:
    assert remote.committed_folder(clone) == clone / "infra" / "dvc-remote"
    with pytest.raises(ConfigError, match="a folder that git commits") as caught:
        versioning.push(HERE, clone)
    assert "--into-git" in str(caught.value.hint)
    (clone / ".gitignore").write_text("/data/\n/ignored/\n")
    (clone / ".dvc" / "config.local").write_text("['remote \"bundled\"']\n    url = ../ignored\n")
    assert remote.committed_folder(clone) is None
    (clone / ".dvc" / "config.local").write_text(f"['remote \"bundled\"']\n    url = {tmp_path / 'shared'}\n")
    assert remote.committed_folder(clone) is None
    assert remote.default(clone) == remote.Remote("bundled", str(tmp_path / "shared"), tmp_path / "shared")


def forget(checkout: Path) -> None:
    """Remove everything but what git knows: the corpus in the work tree and the cache."""
    for folder in (checkout / "data", checkout / ".dvc" / "cache"):
        shutil.rmtree(folder)
