"""Records of runs: `.ingot/runs/<run id>/run.json`, written as the run goes on, read by status, show and resume."""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from pipelines.core.artifact import write_text
from pipelines.core.errors import ConfigError

RECORD = "run.json"
REPORT = "report.html"
PARETO = "pareto.json"
"""Every child by method and bits, as rows: what the report shows of compression."""


class NodeRecord(BaseModel):
    """One node of a run."""

    stage: str
    fingerprint: str
    state: str = "waits"
    """waits, running, cached, done, failed."""
    message: str = ""
    seconds: float | None = None
    done: int = 0
    total: int = 0
    summary: dict[str, Any] = Field(default_factory=dict)
    artifact: str | None = None


class RunRecord(BaseModel):
    """One execution of the graph."""

    id: str
    recipe: str
    overrides: list[str]
    config: dict[str, Any]
    data_hash: str
    status: str = "running"
    """running, done, refused, preempted, failed."""
    started_at: str
    finished_at: str | None = None
    exit_code: int | None = None
    error: str | None = None
    pid: int
    host: str
    nodes: dict[str, NodeRecord]
    init_weights: str | None = None
    """What `pretrain.from` led to when the run began; an alias may name other weights by now."""
    tracking_url: str | None = None
    tracking_pending: bool = False

    def pin(self, overrides: list[str]) -> list[str]:
        """Return overrides that start from the same weights as this run, wherever the aliases point by now."""
        pinned = f"pretrain.from={self.init_weights}"
        return overrides if self.init_weights is None or pinned in overrides else [*overrides, pinned]

    def alive(self) -> bool:
        """Return whether the process of a running record still exists (on this host)."""
        if self.status != "running" or self.host != socket.gethostname():
            return self.status == "running"
        return Path(f"/proc/{self.pid}").exists()


class Runs:
    """The run records of one store.

    Args:
        store_root: root of the store.
    """

    def __init__(self, store_root: Path) -> None:
        self.root = store_root / "runs"

    def start(
        self,
        *,
        recipe: str,
        overrides: list[str],
        config: Mapping[str, Any],
        data_hash: str,
        nodes: dict[str, NodeRecord],
    ) -> RunRecord:
        """Create the record of a run that begins now."""
        now = dt.datetime.now(dt.UTC)
        run_id = f"{now:%Y%m%d-%H%M%S}-{Path(recipe).stem}"
        while (self.root / run_id).exists():
            run_id += "x"
        record = RunRecord(
            id=run_id,
            recipe=recipe,
            overrides=overrides,
            config=dict(config),
            data_hash=data_hash,
            started_at=now.isoformat(timespec="seconds"),
            pid=os.getpid(),
            host=socket.gethostname(),
            nodes=nodes,
        )
        self.save(record)
        return record

    def save(self, record: RunRecord) -> None:
        """Write the record; a reader sees the old or the new one."""
        folder = self.folder(record.id)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECORD, record.model_dump_json(indent=1))

    def finish(self, record: RunRecord, status: str, exit_code: int, error: str | None = None) -> None:
        """Close the record."""
        record.status, record.exit_code, record.error = status, exit_code, error
        record.finished_at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        self.save(record)

    def folder(self, run_id: str) -> Path:
        """Return the folder of a run."""
        return self.root / run_id

    def all(self) -> list[RunRecord]:
        """Return every run, oldest first."""
        return [
            RunRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
            for path in sorted(self.root.glob(f"*/{RECORD}"))
        ]

    def unfinished(self, recipe: str, overrides: list[str]) -> RunRecord | None:
        """Return the newest run of this very command, if it did not come to an end."""
        same = [run for run in self.all() if run.recipe == recipe and run.overrides in (overrides, run.pin(overrides))]
        return same[-1] if same and same[-1].status not in {"done", "refused"} else None

    def pareto(self, run_id: str) -> list[dict[str, Any]]:
        """Return the rows of a run's children by method and bits, as its report shows them; empty without a report."""
        path = self.folder(run_id) / PARETO
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return rows

    def get(self, prefix: str | None = None) -> RunRecord:
        """Return the run whose id starts with `prefix`, the newest when None.

        Raises:
            ConfigError: there is no such run, or more than one.
        """
        found = [run for run in self.all() if prefix is None or run.id.startswith(prefix)]
        if not found:
            raise ConfigError(
                f"there is no run {prefix!r}" if prefix else "there is no run yet", hint="`ingot list runs` shows them"
            )
        if prefix is not None and len(found) > 1 and found[-1].id != prefix:
            raise ConfigError(f"{prefix!r} names {len(found)} runs", hint="`ingot list runs` shows their full ids")
        return found[-1]
