"""Artifacts: published whole or not at all, also under SIGKILL, and every damaged byte noticed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipelines.core import artifact, fingerprint
from pipelines.core.artifact import MANIFEST, Artifact, commit, load, publish, write_text
from pipelines.core.errors import IntegrityError

CHECKOUT = Path(__file__).resolve().parents[3]
PAYLOAD = {"model/weights.bin": b"\x00\x01\x02" * 100, "summary.json": b'{"x": 1}', "logs/times.txt": b"3.2 s"}


def fill(folder: Path, payload: dict[str, bytes] = PAYLOAD) -> Path:
    for name, content in payload.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def make(tmp_path: Path, name: str = "final", payload: dict[str, bytes] = PAYLOAD, **changes: Any) -> Artifact:
    facts: dict[str, Any] = {
        "stage": "compress",
        "node": "compress.rtn",
        "identity": {"stage": "compress", "config": {"bits": 8, "lr": 1e-7}},
        "parents": {"model": "ab" * 32},
        "summary": {"bits_per_weight": 8.125, "name": "é"},
        "observations": ("logs/",),
    }
    return publish(fill(tmp_path / "build", payload), tmp_path / name, **(facts | changes))


def test_what_was_published_is_what_is_loaded(tmp_path: Path) -> None:
    published = make(tmp_path)
    loaded = load(tmp_path / "final")
    assert loaded.manifest == published.manifest
    assert loaded.manifest.fingerprint == fingerprint.digest(loaded.manifest.identity)
    assert {name: record.size for name, record in loaded.manifest.files.items()} == {
        name: len(content) for name, content in PAYLOAD.items()
    }
    assert loaded.size == sum(len(content) for content in PAYLOAD.values())
    assert loaded.read_json("summary.json") == {"x": 1}
    loaded.verify()
    assert not (tmp_path / "build").exists()


def test_the_digest_covers_results_and_not_observations(tmp_path: Path) -> None:
    base = make(tmp_path, "a")
    slower = make(tmp_path, "b", {**PAYLOAD, "logs/times.txt": b"9.9 s"})
    other = make(tmp_path, "c", {**PAYLOAD, "summary.json": b'{"x": 2}'})
    renamed = make(tmp_path, "d", {"model/w.bin": PAYLOAD["model/weights.bin"], "summary.json": b'{"x": 1}'})
    assert slower.digest == base.digest
    assert len({base.digest, other.digest, renamed.digest}) == 3


def test_observations_are_verified_all_the_same(tmp_path: Path) -> None:
    made = make(tmp_path)
    (made.path / "logs/times.txt").write_bytes(b"0.1 s")
    with pytest.raises(IntegrityError, match=r"logs/times\.txt"):
        made.verify()


def test_publishing_again_replaces_the_artifact(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path, payload={"new.txt": b"new"})
    assert sorted(path.name for path in (tmp_path / "final").iterdir()) == [MANIFEST, "new.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]


@pytest.mark.parametrize("name", ["model/weights.bin", "summary.json", "logs/times.txt"])
def test_damage_is_named_with_the_file_and_both_hashes(tmp_path: Path, name: str) -> None:
    made = make(tmp_path)
    (made.path / name).write_bytes(PAYLOAD[name][:-1])
    found = fingerprint.hash_file(made.path / name)
    with pytest.raises(IntegrityError, match="does not match its manifest") as caught:
        made.verify()
    assert str(made.path / name) in caught.value.message
    assert made.manifest.files[name].sha256 in caught.value.message
    assert found in caught.value.message


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    made = make(tmp_path)
    (made.path / "summary.json").unlink()
    with pytest.raises(IntegrityError, match=r"summary\.json .*found \(missing\)"):
        made.verify()


@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
@example(position=236, bit=5)  # the `e` of a number in the manifest, which as `E` is the same number
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_bit_passes(tmp_path: Path, position: int, bit: int) -> None:
    """Anywhere in the artifact, the manifest itself included."""
    final = tmp_path / "final"
    if not final.exists():
        make(tmp_path)
    files = sorted(path for path in final.rglob("*") if path.is_file())
    offset = position % sum(path.stat().st_size for path in files)
    for path in files:
        if offset < path.stat().st_size:
            break
        offset -= path.stat().st_size
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + bytes([whole[offset] ^ (1 << bit)]) + whole[offset + 1 :])
    try:
        with pytest.raises(IntegrityError):
            load(final).verify()
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("keep", [0, 1, 50, -1])
def test_a_cut_manifest_is_refused(tmp_path: Path, keep: int) -> None:
    path = make(tmp_path).path / MANIFEST
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(IntegrityError, match=r"manifest\.json is damaged"):
        load(tmp_path / "final")


@pytest.mark.parametrize(
    "text", ["[]", "null", '"x"', "{}", '{"schema_version": 1}', '{"schema_version": "2"}', "[" * 10**5]
)
def test_a_manifest_of_the_wrong_form_is_refused(tmp_path: Path, text: str) -> None:
    (make(tmp_path).path / MANIFEST).write_text(text)
    with pytest.raises(IntegrityError, match=r"manifest\.json is damaged"):
        load(tmp_path / "final")


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    fill(tmp_path / "final")
    with pytest.raises(IntegrityError, match="is not an artifact"):
        load(tmp_path / "final")


def test_a_newer_schema_is_refused_with_both_versions(tmp_path: Path) -> None:
    path = make(tmp_path).path / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 7}))
    with pytest.raises(IntegrityError, match="schema version 7; this checkout reads 1"):
        load(tmp_path / "final")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "", "a\0b"])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    made = make(tmp_path)
    record = next(iter(made.manifest.files.values()))
    evil = made.manifest.model_copy(update={"files": {name: record}})
    made.path.rename(tmp_path / "again")
    commit(tmp_path / "again", tmp_path / "final", evil)
    with pytest.raises(IntegrityError, match=f"lies outside of {re.escape(str(tmp_path))}"):
        load(tmp_path / "final")


def test_write_text_leaves_only_the_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "old")
    write_text(tmp_path / "a.json", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "new")]


# ---- SIGKILL inside publish -----------------------------------------------------------------------------------------

PUBLISH = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from pipelines.core.artifact import publish
root = Path(sys.argv[2])
for name in ("a", "b"):
    (root / "build").mkdir(exist_ok=True)
    (root / "build" / name).write_bytes(sys.argv[3].encode() * 1000)
publish(root / "build", root / "final", stage="prepare", node="prepare", identity={"n": sys.argv[3]}, parents={},
        summary={})
"""


@pytest.fixture
def publish_in_a_process(tmp_path: Path) -> Callable[[str, str | None], int]:
    """Publish the content in a process of its own, killed at a point (None: not); return its exit code."""

    def run(content: str, point: str | None) -> int:
        plan = tmp_path / f"faults-{content}.json"
        plan.write_text(json.dumps([{"point": point, "action": "SIGKILL"}] if point else []))
        command = [sys.executable, "-c", PUBLISH, str(CHECKOUT), str(tmp_path / "store"), content]
        (tmp_path / "store").mkdir(exist_ok=True)
        return subprocess.run(command, env={"INGOT_FAULTS": str(plan)}, timeout=60).returncode

    return run


@pytest.mark.parametrize(
    ("point", "left"),
    [
        ("artifact.before_manifest", "old"),
        ("artifact.after_manifest", "old"),
        ("artifact.mid_swap", None),
        ("artifact.after_rename", "new"),
    ],
)
def test_sigkill_inside_publish_leaves_the_old_the_new_or_none_never_a_mixture(
    tmp_path: Path, publish_in_a_process: Callable[[str, str | None], int], point: str, left: str | None
) -> None:
    final = tmp_path / "store" / "final"
    assert publish_in_a_process("old", None) == 0
    assert publish_in_a_process("new", point) == -signal.SIGKILL
    if left is None:
        assert not final.exists()
    else:
        found = load(final)
        found.verify()
        assert found.manifest.identity == {"n": left}
    assert publish_in_a_process("third", None) == 0
    load(final).verify()
    assert load(final).manifest.identity == {"n": "third"}
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["final"]


@pytest.mark.parametrize("point", ["artifact.before_manifest", "artifact.after_manifest"])
def test_sigkill_inside_the_first_publish_leaves_no_artifact(
    tmp_path: Path, publish_in_a_process: Callable[[str, str | None], int], point: str
) -> None:
    assert publish_in_a_process("new", point) == -signal.SIGKILL
    with pytest.raises(IntegrityError, match="is not an artifact"):
        load(tmp_path / "store" / "final")


def test_every_file_is_on_the_disk_before_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    real = artifact.sync
    monkeypatch.setattr(artifact, "sync", lambda path: (synced.append(path), real(path)))
    make(tmp_path)
    build = tmp_path / "build"
    manifest = next(i for i, path in enumerate(synced) if MANIFEST in path.name)
    assert {build / name for name in PAYLOAD} | {build / "model", build / "logs"} <= set(synced[:manifest])
    assert synced[-1] == tmp_path


def test_the_files_of_an_artifact_are_for_whom_the_umask_says(tmp_path: Path) -> None:
    """A group that shares a store reads each other's weights, which safetensors writes for their owner alone."""
    for name, folder_mode, file_mode in (
        ("shared", 0o2775, 0o664),
        ("readable", 0o755, 0o644),
        ("private", 0o700, 0o600),
    ):
        build = tmp_path / name
        (build / "model").mkdir(parents=True)
        build.chmod(folder_mode)
        weights = build / "model" / "model.safetensors"
        weights.write_bytes(b"w")
        weights.chmod(0o600)
        made = artifact.publish(
            build, tmp_path / "made" / name, stage="toy", node="toy", identity={"n": name}, parents={}, summary={}
        )
        assert (made.path / "model" / "model.safetensors").stat().st_mode & 0o777 == file_mode
        made.verify()
