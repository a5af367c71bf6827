"""The tracking record: it survives restarts, tolerates damage, and lists runs oldest first."""

from __future__ import annotations

from pathlib import Path

from pipelines.tracking import record as records
from pipelines.tracking.record import StageRecord, TrackingRecord


def make(run_id: str) -> TrackingRecord:
    """Return a small record."""
    stages = {"prepare": StageRecord(fingerprint="f" * 64, params={"a": [1, 2]})}
    return TrackingRecord(run_id=run_id, recipe="smoke", experiment="ingot", git_commit="abc", stages=stages)


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    records.save(make("r1"), tmp_path)
    assert records.load(tmp_path, "r1") == make("r1")


def test_a_record_is_pending_until_it_says_otherwise() -> None:
    assert make("r1").pending


def test_a_missing_or_damaged_record_is_none(tmp_path: Path) -> None:
    records.save(make("r1"), tmp_path)
    records.path_of(tmp_path, "r1").write_text('{"run_id": "r1"')
    assert records.load(tmp_path, "r1") is None
    assert records.load(tmp_path, "r2") is None
    assert records.load_all(tmp_path) == []


def test_records_are_listed_oldest_first(tmp_path: Path) -> None:
    for name in ("20261102-1", "20261101-1", "20261103-1"):
        records.save(make(name), tmp_path)
    assert [record.run_id for record in records.load_all(tmp_path)] == ["20261101-1", "20261102-1", "20261103-1"]


def test_a_field_of_a_later_version_is_no_obstacle(tmp_path: Path) -> None:
    records.save(make("r1"), tmp_path)
    path = records.path_of(tmp_path, "r1")
    path.write_text(path.read_text().replace('"recipe"', '"colour": "red", "recipe"'))
    assert records.load(tmp_path, "r1") == make("r1")
