"""The store: found by fingerprint, and never deceived by what is unfinished or damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.core import artifact, fingerprint, hash_memo
from pipelines.core.artifact import Artifact
from pipelines.core.errors import IntegrityError, LockedError
from pipelines.core.fingerprint import digest
from pipelines.core.store import Store


def publish(store: Store, stage: str, number: int) -> Artifact:
    identity = {"stage": stage, "n": number}
    build = store.build_folder(stage, digest(identity))
    (build / "n.txt").write_text(str(number))
    return artifact.publish(
        build, store.path(stage, digest(identity)), stage=stage, node=stage, identity=identity, parents={}, summary={}
    )


def test_an_artifact_is_found_by_stage_and_fingerprint(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = publish(store, "prepare", 1)
    found = store.find("prepare", made.manifest.fingerprint)
    assert found == made
    assert store.find("compress", made.manifest.fingerprint) is None
    assert store.find("prepare", digest({"stage": "prepare", "n": 2})) is None


def test_an_empty_store_has_nothing_and_creates_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "nowhere")
    assert store.find("prepare", "ab" * 32) is None
    assert list(store.artifacts()) == []
    assert not (tmp_path / "nowhere").exists()


def test_an_artifact_under_the_wrong_name_is_not_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = publish(store, "prepare", 1)
    wrong = digest({"stage": "prepare", "n": 2})
    made.path.rename(store.path("prepare", wrong))
    assert store.find("prepare", wrong) is None


def test_artifacts_come_oldest_first_without_unfinished_or_retired_ones(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = [publish(store, stage, n) for n, stage in enumerate(["prepare", "pretrain", "compress"])]
    for age, each in enumerate(reversed(made)):
        os.utime(each.path / artifact.MANIFEST, (1e9 - age, 1e9 - age))
    for name in (".building-" + "ab" * 16, ".retired-x-1"):
        (tmp_path / "artifacts" / "prepare" / name).mkdir()
        (tmp_path / "artifacts" / "prepare" / name / artifact.MANIFEST).write_text("{}")
    assert [each.manifest.stage for each in store.artifacts()] == ["prepare", "pretrain", "compress"]
    assert list(store.damaged()) == []


def test_one_damaged_manifest_hides_no_other_artifact_and_is_reported(tmp_path: Path) -> None:
    store = Store(tmp_path)
    good, bad = publish(store, "prepare", 1), publish(store, "prepare", 2)
    (bad.path / artifact.MANIFEST).write_text("{}")
    assert list(store.artifacts()) == [good]
    assert store.find("prepare", bad.manifest.fingerprint) is None
    (error,) = store.damaged()
    assert str(bad.path) in error.message


def test_scratch_is_the_same_at_every_attempt_and_apart_for_every_fingerprint(tmp_path: Path) -> None:
    first, again = (Store(tmp_path).scratch("pretrain", "ab" * 32) for _attempt in range(2))
    assert first == again
    assert Store(tmp_path).scratch("pretrain", "cd" * 32) != first


def test_a_build_folder_starts_empty_after_a_killed_attempt(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.build_folder("prepare", "ab" * 32) / "half").write_text("half")
    assert list(store.build_folder("prepare", "ab" * 32).iterdir()) == []


def test_the_lease_of_one_artifact_leaves_the_others_free(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.lease("prepare", "ab" * 32, wait_s=0):
        with store.lease("prepare", "cd" * 32, wait_s=0):
            pass
        with (
            pytest.raises(LockedError, match=rf"stage prepare-(ab){{16}} is locked by process {os.getpid()}"),
            store.lease("prepare", "ab" * 32, wait_s=0),
        ):
            pass


def test_an_input_is_read_once_for_all_nodes_of_a_run_and_a_changed_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_memo, "_GRAIN_NS", -(10**12))
    read: list[Path] = []
    hash_file = fingerprint.hash_file
    made = publish(Store(tmp_path), "prepare", 1)
    monkeypatch.setattr(fingerprint, "hash_file", lambda path: read.append(path) or hash_file(path))
    for _node in range(3):
        Store(tmp_path).verify(made)
    assert read == [made.path / "n.txt"]
    (made.path / "n.txt").write_text("2")
    with pytest.raises(IntegrityError, match=r"n\.txt does not match its manifest"):
        Store(tmp_path).verify(made)
    (made.path / "n.txt").unlink()
    with pytest.raises(IntegrityError, match=r"found \(missing\)"):
        Store(tmp_path).verify(made)
