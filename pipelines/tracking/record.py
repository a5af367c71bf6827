"""What a run has to tell MLflow, kept on disk: `.ingot/runs/<run id>/tracking.json`.

MLflow may be down, slow, or come back next week. So the facts go to this record first, and MLflow is made equal to it,
during the run or later by `ingot sync`. Secrets are removed before anything enters the record.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipelines.core import lock
from pipelines.core.artifact import write_text

RECORD = "tracking.json"


class StageRecord(BaseModel):
    """One stage node of a run."""

    model_config = ConfigDict(extra="ignore")

    fingerprint: str
    params: dict[str, Any] = Field(default_factory=dict)
    """The stage's resolved configuration, secrets removed."""
    artifact: str | None = None
    """Folder of the published artifact."""
    cached: bool | None = None
    """True when this run found the artifact; False when it made it; None while it works."""
    status: str = "RUNNING"
    """MLflow's words: RUNNING, FINISHED, FAILED, KILLED."""
    mlflow_id: str | None = None
    began_ms: int = 0
    """When its first attempt began, milliseconds since 1970."""
    new: bool = False
    """True until MLflow was asked to create this run: until then nobody has to search for it."""


class TrackingRecord(BaseModel):
    """One run."""

    model_config = ConfigDict(extra="ignore")

    run_id: str
    recipe: str
    experiment: str
    git_commit: str
    data_hash: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    stages: dict[str, StageRecord] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    """Name in MLflow -> path of a small file that the parent run carries."""
    status: str = "RUNNING"
    mlflow_id: str | None = None
    new: bool = False
    """As of a stage."""
    pending: bool = True
    """True while MLflow may lack something that this record has."""


def path_of(store_root: Path, run_id: str) -> Path:
    """Return where the record of a run lies."""
    return store_root / "runs" / run_id / RECORD


def lease(store_root: Path, run_id: str) -> contextlib.AbstractContextManager[None]:
    """Return the right to mirror a run: one process at a time has it."""
    path = path_of(store_root, run_id).with_suffix(".lock")
    return lock.hold(path, what=f"the tracking of run {run_id}", wait_s=0)


def save(record: TrackingRecord, store_root: Path) -> None:
    """Write a record; a reader sees the old one or the new one."""
    path = path_of(store_root, record.run_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, record.model_dump_json(indent=1))


def load(store_root: Path, run_id: str) -> TrackingRecord | None:
    """Return the record of a run, or None when it has none that can be read."""
    try:
        return TrackingRecord.model_validate(json.loads(path_of(store_root, run_id).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def load_all(store_root: Path) -> list[TrackingRecord]:
    """Return every record, oldest run first."""
    names = sorted(path.parent.name for path in store_root.glob(f"runs/*/{RECORD}"))
    return [record for name in names if (record := load(store_root, name)) is not None]
