"""Bring MLflow up to date with what past runs had to tell while it was away."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipelines.core.errors import LockedError, TransientError
from pipelines.tracking import record as records
from pipelines.tracking.client import reachable
from pipelines.tracking.config import TrackingConfig, resolve_uri
from pipelines.tracking.mirror import open_mirror
from pipelines.tracking.record import TrackingRecord


@dataclass(frozen=True)
class SyncResult:
    """What became of one pending run."""

    run_id: str
    synced: bool
    message: str


def sync(config: TrackingConfig, store_root: Path) -> list[SyncResult]:
    """Send everything that MLflow lacks of every pending run; runs at work are left to themselves."""
    return [_sync_one(config, store_root, r.run_id) for r in records.load_all(store_root) if r.pending]


def _sync_one(config: TrackingConfig, store_root: Path, run_id: str) -> SyncResult:
    try:
        with records.lease(store_root, run_id):
            record = records.load(store_root, run_id)
            if record is None or not record.pending:
                return SyncResult(run_id, synced=True, message="nothing to do")
            return _send(config, store_root, record)
    except LockedError:
        return SyncResult(run_id, synced=False, message="at work")


def _send(config: TrackingConfig, store_root: Path, record: TrackingRecord) -> SyncResult:
    # Nobody holds its lease, so a run or stage that still says RUNNING was killed.
    record.status = _ended(record.status)
    for stage in record.stages.values():
        stage.status = _ended(stage.status)
    try:
        with reachable(resolve_uri(config, store_root), what=f"run {record.run_id}"):
            open_mirror(config, store_root, record, partial(records.save, record, store_root)).everything()
        record.pending = False
    except TransientError as error:
        return SyncResult(record.run_id, synced=False, message=error.message)
    finally:
        records.save(record, store_root)
    return SyncResult(record.run_id, synced=True, message="sent")


def _ended(status: str) -> str:
    return "KILLED" if status == "RUNNING" else status
