"""The store: found by fingerprint, and never deceived by what is unfinished or damaged."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipelines.core import artifact, fingerprint, garbage, hash_memo
from pipelines.core.artifact import Artifact
from pipelines.core.errors import IntegrityError, LockedError
from pipelines.core.fingerprint import digest
from pipelines.core.store import LocalStore, Store, open_store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of either kind."""
    if request.param == "local":
        return open_store(tmp_path / "store")
    return open_store(request.getfixturevalue("s3_store"))


def publish(store: Store, stage: str, number: int, text: str | None = None) -> Artifact:
    identity = {"stage": stage, "n": number}
    key = digest(identity)
    with store.lease(stage, key, wait_s=0) as lease:
        build = store.build_folder(stage, key)
        (build / "n.txt").write_text(text or str(number))
        (build / "more").mkdir()
        (build / "more" / "m.bin").write_bytes(b"m" * number)
        return store.publish(build, stage, key, lease, node=stage, identity=identity, parents={}, summary={})


# ---- what every store does ------------------------------------------------------------------------------------------


def test_an_artifact_is_found_by_stage_and_fingerprint(store: Store) -> None:
    made = publish(store, "prepare", 1)
    found = store.find("prepare", made.manifest.fingerprint)
    assert found == made
    assert (found.path / "n.txt").read_text() == "1"
    assert (found.path / "more" / "m.bin").read_bytes() == b"m"
    assert store.find("compress", made.manifest.fingerprint) is None
    assert store.find("prepare", digest({"stage": "prepare", "n": 2})) is None


def test_an_empty_store_has_nothing(store: Store) -> None:
    assert store.find("prepare", "ab" * 32) is None
    assert list(store.artifacts()) == list(store.damaged()) == []
    assert store.inputs_in_use() == set()
    assert store.texts("runs/*/run.json") == {}
    assert (store.read("registry/history.jsonl"), store.modified("registry/history.jsonl")) == (None, None)


def test_an_artifact_that_is_made_again_replaces_the_old_one_whole(store: Store) -> None:
    old, new = publish(store, "prepare", 1), publish(store, "prepare", 1, text="other bytes")
    (found,) = store.artifacts()
    assert found.digest == new.digest != old.digest
    assert (found.path / "n.txt").read_text() == "other bytes"
    store.verify(found)


def test_an_artifact_that_was_withdrawn_is_gone(store: Store) -> None:
    made, kept = publish(store, "prepare", 1), publish(store, "prepare", 2)
    store.withdraw("prepare", made.manifest.fingerprint)
    assert list(store.artifacts()) == [kept]
    assert store.find("prepare", made.manifest.fingerprint) is None
    assert store.size_of(made.folder) == 0


def test_garbage_is_what_nobody_wants_and_what_it_descends_from_is_kept(store: Store) -> None:
    unwanted, wanted = publish(store, "prepare", 1), publish(store, "prepare", 2)
    with store.lease("pretrain", "ab" * 32, wait_s=0) as lease:
        with store.attempt("pretrain", "ab" * 32, lease, ()) as scratch:
            (scratch / "half").write_text("half")
        assert store.has_scratch("pretrain", "ab" * 32)
        found = garbage.find(store, {wanted.manifest.fingerprint}, set())
        assert [(each.kind, each.path) for each in found] == [("artifact", unwanted.folder)]  # the rest is at work
    found = garbage.find(store, {wanted.manifest.fingerprint}, set())
    assert [each.kind for each in found] == ["artifact", "scratch"]
    assert all(each.bytes > 0 for each in found)
    assert list(garbage.remove(store, found)) == found
    assert list(store.artifacts()) == [wanted]
    assert not store.has_scratch("pretrain", "ab" * 32)
    assert garbage.find(store, {wanted.manifest.fingerprint}, set()) == []


def test_scratch_is_the_same_at_every_attempt_and_apart_for_every_fingerprint(store: Store) -> None:
    first, again = (store.scratch("pretrain", "ab" * 32) for _attempt in range(2))
    assert first == again
    assert store.scratch("pretrain", "cd" * 32) != first


def test_a_build_folder_starts_empty_after_a_killed_attempt(store: Store) -> None:
    (store.build_folder("prepare", "ab" * 32) / "half").write_text("half")
    assert list(store.build_folder("prepare", "ab" * 32).iterdir()) == []


def test_the_lease_of_one_artifact_leaves_the_others_free(store: Store) -> None:
    with store.lease("prepare", "ab" * 32, wait_s=0, inputs=["ef" * 32]) as lease:
        lease.check()
        assert not store.is_free(f"leases/prepare-{'ab' * 16}")
        assert store.inputs_in_use() == {"ef" * 32}
        with store.lease("prepare", "cd" * 32, wait_s=0):
            pass
        with (
            pytest.raises(LockedError, match=rf"stage prepare-(ab){{16}} is locked by process {os.getpid()}"),
            store.lease("prepare", "ab" * 32, wait_s=0),
        ):
            pass
    assert store.is_free(f"leases/prepare-{'ab' * 16}")
    assert store.inputs_in_use() == set()
    with store.lease("prepare", "ab" * 32, wait_s=0):
        pass


def test_texts_are_written_once_replaced_and_added_to(store: Store) -> None:
    assert store.create("runs/one/run.json", "1")
    assert not store.create("runs/one/run.json", "2")
    store.write("runs/two/run.json", "2")
    store.write("runs/two/report.html", "<p>")
    assert store.texts("runs/*/run.json") == {"runs/one/run.json": "1", "runs/two/run.json": "2"}
    store.write("runs/one/run.json", "3")
    assert store.texts("runs/*/run.json")["runs/one/run.json"] == store.read("runs/one/run.json") == "3"
    assert store.modified("runs/one/run.json") == pytest.approx(time.time(), abs=60)
    for line in ("first", "second"):
        store.append("registry/history.jsonl", line)
    assert store.read("registry/history.jsonl") == "first\nsecond\n"
    assert store.discard(store.root / "runs" / "one")
    assert list(store.texts("runs/*/run.json")) == ["runs/two/run.json"]


# ---- a folder -------------------------------------------------------------------------------------------------------


def test_looking_into_a_local_store_creates_nothing(tmp_path: Path) -> None:
    assert list(open_store(tmp_path / "nowhere").artifacts()) == []
    assert not (tmp_path / "nowhere").exists()


def test_an_artifact_under_the_wrong_name_is_not_found(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    made = publish(store, "prepare", 1)
    wrong = digest({"stage": "prepare", "n": 2})
    made.path.rename(store.path("prepare", wrong))
    assert store.find("prepare", wrong) is None


def test_artifacts_come_oldest_first_without_unfinished_or_retired_ones(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    made = [publish(store, stage, n) for n, stage in enumerate(["prepare", "pretrain", "compress"])]
    for age, each in enumerate(reversed(made)):
        os.utime(each.path / artifact.MANIFEST, (1e9 - age, 1e9 - age))
    for name in (".building-" + "ab" * 16, ".retired-x-1"):
        (tmp_path / "artifacts" / "prepare" / name).mkdir()
        (tmp_path / "artifacts" / "prepare" / name / artifact.MANIFEST).write_text("{}")
    assert [each.manifest.stage for each in store.artifacts()] == ["prepare", "pretrain", "compress"]
    assert list(store.damaged()) == []


def test_one_damaged_manifest_hides_no_other_artifact_and_is_reported(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    good, bad = publish(store, "prepare", 1), publish(store, "prepare", 2)
    (bad.path / artifact.MANIFEST).write_text("{}")
    assert list(store.artifacts()) == [good]
    assert store.find("prepare", bad.manifest.fingerprint) is None
    (error,) = store.damaged()
    assert str(bad.path) in error.message


def test_an_input_is_read_once_for_all_nodes_of_a_run_and_a_changed_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_memo, "_GRAIN_NS", -(10**12))
    read: list[Path] = []
    hash_file = fingerprint.hash_file
    made = publish(LocalStore(tmp_path), "prepare", 1)
    monkeypatch.setattr(fingerprint, "hash_file", lambda path: read.append(path) or hash_file(path))
    for _node in range(3):
        LocalStore(tmp_path).verify(made)
    assert read == [made.path / "more" / "m.bin", made.path / "n.txt"]
    (made.path / "n.txt").write_text("2")
    with pytest.raises(IntegrityError, match=r"n\.txt does not match its manifest"):
        LocalStore(tmp_path).verify(made)
    (made.path / "n.txt").unlink()
    with pytest.raises(IntegrityError, match=r"found \(missing\)"):
        LocalStore(tmp_path).verify(made)
