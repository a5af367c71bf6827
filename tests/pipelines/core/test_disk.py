"""A disk that is really full: a clear error, nothing half-written, and the same call completes once there is room."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipelines.core import artifact
from pipelines.core import disk as disk_space
from pipelines.core.artifact import Artifact
from pipelines.core.errors import DiskFullError, IngotError, IntegrityError, TransientError
from pipelines.core.run_stage import materialize
from pipelines.core.settings import Settings
from pipelines.core.stage import Stage, StageContext, StageFunction
from pipelines.core.store import LocalStore

KIB = 1024


def fill(disk: Any, leave: int) -> Path:
    """Fill a disk but for `leave` bytes; returns the file that does."""
    filler: Path = disk.path / "filler"
    filler.write_bytes(b"\0" * (disk_space.free(disk.path) - leave))
    return filler


class Writing(Stage):
    """A stage that writes a file of 200 KiB, then a second one, and keeps a note in its scratch folder."""

    def body(self) -> StageFunction:
        def run(config: Any, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> dict[str, Any]:
            (context.scratch / "progress").write_text("half way")
            for name in ("first", "second"):
                (out_dir / name).write_bytes(name.encode() * (200 * KIB // len(name)))
            return {}

        return run


def make(store: LocalStore, *, force: bool = False) -> Artifact:
    stage = Writing("prepare", version=1, entry="none:none")
    context = StageContext(node="prepare", scratch=Path("/nowhere"))
    return materialize(stage, Settings(), {}, store, context, input_keys={}, data_hash=None, force=force)


@pytest.mark.parametrize("room_kib", [40, 300, 400])
def test_a_stage_on_a_full_disk_says_what_to_do_leaves_nothing_and_completes_later(
    disk_of: Callable[[int], Any], room_kib: int
) -> None:
    """The disk fills in the first file, in the second, and (400 KiB: both files fit) while the manifest is written."""
    disk = disk_of(1024)
    store = LocalStore(disk.path / "store")
    for folder in ("leases", "artifacts/prepare", "scratch"):
        (store.root / folder).mkdir(parents=True)
    # A page each for the two locks of the lease, the note in scratch, and their folder's names.
    filler = fill(disk, (room_kib + 4) * KIB)
    with pytest.raises(DiskFullError, match="no space for the artifact of prepare in") as caught:
        make(store)
    assert "bytes were written before the disk was full" in str(caught.value)
    assert "-> free some space (`ingot gc --dry-run`" in str(caught.value)
    assert list(store.artifacts()) == []
    assert list((store.root / "artifacts" / "prepare").iterdir()) == []
    assert [path.read_text() for path in (store.root / "scratch").rglob("progress")] == ["half way"]
    filler.unlink()
    made = make(store)
    made.verify()
    assert sorted(made.manifest.files) == ["first", "second"]


def test_a_published_artifact_survives_a_full_disk_when_it_is_made_again(disk_of: Callable[[int], Any]) -> None:
    disk = disk_of(1024)
    store = LocalStore(disk.path / "store")
    first = make(store)
    fill(disk, 100 * KIB)
    with pytest.raises(DiskFullError):
        make(store, force=True)
    (found,) = store.artifacts()
    found.verify()
    assert found.digest == first.digest


def test_a_small_record_keeps_its_old_text_and_leaves_no_temporary_file(disk_of: Callable[[int], Any]) -> None:
    disk = disk_of(256)
    record = disk.path / "record.json"
    artifact.write_text(record, "old")
    fill(disk, 8 * KIB)
    with pytest.raises(OSError, match="No space left on device"):
        artifact.write_text(record, "new" * 8 * KIB)
    assert record.read_text() == "old"
    assert sorted(path.name for path in disk.path.iterdir()) == ["filler", "record.json"]


def sqlite(folder: Path) -> None:
    connection = sqlite3.connect(folder / "a.db")
    try:
        connection.execute("CREATE TABLE t (x BLOB)")
        connection.execute("INSERT INTO t VALUES (zeroblob(1000000))")
        connection.commit()
    finally:
        connection.close()


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "a").write_bytes(b"\0" * 10**6),
        lambda folder: save_file({"a": torch.zeros(250_000)}, folder / "a.safetensors"),
        sqlite,
    ],
    ids=["python", "rust", "sqlite"],
)
def test_every_language_that_we_write_with_is_understood(
    disk_of: Callable[[int], Any], write: Callable[[Path], Any]
) -> None:
    disk = disk_of(200)
    said = f"no space for a test in {disk.path}"
    with pytest.raises(DiskFullError, match=said) as caught, disk_space.explained("a test", disk.path):
        write(disk.path)
    assert disk_space.is_full(caught.value)
    assert caught.value.exit_code == TransientError.exit_code


def test_an_error_of_ours_that_a_full_disk_caused_is_told_as_it_is(tmp_path: Path) -> None:
    def fail() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as cause:
            raise IntegrityError("the manifest is damaged") from cause

    with pytest.raises(IntegrityError, match="damaged") as caught, disk_space.explained("a test", tmp_path):
        fail()
    assert disk_space.is_full(caught.value)


def test_other_errors_are_not_mistaken_for_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    with pytest.raises(PermissionError), disk_space.explained("a test", tmp_path, remove=True):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert (tmp_path / "kept").exists()
    assert not disk_space.is_full(IngotError("'No space left on device' is what users read"))
    assert not disk_space.is_full(None)


def test_free_space_of_a_folder_that_is_not_there_yet_is_that_of_its_file_system(
    disk_of: Callable[[int], Any], tmp_path: Path
) -> None:
    disk = disk_of(512)
    assert disk_space.free(disk.path / "not" / "yet") == 512 * KIB
    (disk.path / "a").write_bytes(b"\0" * 100 * KIB)
    assert disk_space.free(disk.path / "not" / "yet") == 412 * KIB
    assert disk_space.size_of(disk.path) == 100 * KIB
    assert disk_space.size_of(tmp_path / "nowhere") == 0
