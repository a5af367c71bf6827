"""Records of runs: `.ingot/runs/<run id>/run.json`, written as the run goes on, read by status, show and resume."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from pipelines.core.artifact import write_text
from pipelines.core.errors import ConfigError
from pipelines.core.processes import ProcessName, this_process
from pipelines.core.redaction import HIDDEN, redact, redact_override, redact_value
from pipelines.core.store import Store

RECORD = "run.json"
REPORT = "report.html"
PARETO = "pareto.json"
"""Every variant by method and bits, as rows: what the report shows of compression."""

_TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"
_CAME_TO_ITS_END = ("done", "refused")
"""A run that the gate refused has done all there was to do; running it again would only refuse again."""


class NodeRecord(BaseModel):
    """One node of a run."""

    stage: str
    fingerprint: str
    resume_key: str = ""
    """What its unfinished work is found by."""
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
    """Without secrets, like `config`: see `command`."""
    config: dict[str, Any]
    data_hash: str
    status: str = "running"
    """running, done, refused, preempted, failed."""
    started_at: str
    finished_at: str | None = None
    exit_code: int | None = None
    error: str | None = None
    process: ProcessName | None = None
    """Who executes it."""
    nodes: dict[str, NodeRecord]
    init_weights: str | None = None
    """What `pretrain.from` led to when the run began; an alias may name other weights by now."""
    tracking_url: str | None = None
    tracking_pending: bool = False
    """Whether MLflow lacks a part of this run; `ingot sync` sends it."""
    tracking_problem: str | None = None

    def pin(self, overrides: list[str]) -> list[str]:
        """Return overrides that start from the same weights as this run, wherever the aliases point by now."""
        pinned = f"pretrain.from={self.init_weights}"
        return overrides if self.init_weights is None or pinned in overrides else [*overrides, pinned]

    def command(self) -> list[str]:
        """Return the overrides that make this run again.

        Raises:
            ConfigError: one of them held a secret, which no record keeps.
        """
        overrides = self.pin(self.overrides)
        if os.environ.get(_TRACKING_VARIABLE):
            overrides = [o for o in overrides if not (o.startswith("tracking.uri=") and HIDDEN in o)]
        if lost := [o.partition("=")[0] for o in overrides if HIDDEN in o]:
            raise ConfigError(
                f"{', '.join(lost)} of run {self.id} held a secret, which no record keeps",
                hint="give the whole command of that run again"
                + (f", or set ${_TRACKING_VARIABLE}" if lost == ["tracking.uri"] else ""),
            )
        return overrides

    @property
    def at_work(self) -> bool:
        """Whether the process that executes it still exists, as far as this host can tell."""
        return self.status == "running" and self.process is not None and self.process.alive()

    @property
    def state(self) -> str:
        """The status, or `killed` where a run that says it is running has lost its process."""
        return "killed" if self.status == "running" and not self.at_work else self.status

    @property
    def unfinished(self) -> bool:
        """Whether it stopped before its end, so that `ingot resume` has something to go on with."""
        return self.status not in _CAME_TO_ITS_END and not self.at_work


class Runs:
    """The run records of one store.

    Args:
        store_root: root of the store.
    """

    def __init__(self, store_root: Path) -> None:
        self.root = store_root / "runs"
        self._store = Store(store_root)

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
        record = RunRecord(
            id=self._claim(f"{now:%Y%m%d-%H%M%S}-{Path(recipe).stem}"),
            recipe=recipe,
            overrides=[redact_override(override) for override in overrides],
            config={name: redact_value(name, value) for name, value in config.items()},
            data_hash=data_hash,
            started_at=now.isoformat(timespec="seconds"),
            process=this_process(),
            nodes=nodes,
        )
        with self._store.registering():  # from now on `ingot gc` leaves in place what it needs
            self.save(record)
        return record

    def _claim(self, wanted: str) -> str:
        """Return an id that no other run has: whoever creates the folder owns it."""
        self.root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            run_id = wanted if number == 1 else f"{wanted}-{number}"
            with contextlib.suppress(FileExistsError):
                (self.root / run_id).mkdir()
                return run_id
        raise AssertionError

    def save(self, record: RunRecord) -> None:
        """Write the record; a reader sees the old or the new one."""
        folder = self.folder(record.id)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECORD, record.model_dump_json(indent=1))

    def finish(self, record: RunRecord, status: str, exit_code: int, error: str | None = None) -> None:
        """Close the record."""
        record.status, record.exit_code = status, exit_code
        record.error = None if error is None else redact(error)
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

    def cut_off(self, recipe: str, overrides: list[str]) -> RunRecord | None:
        """Return the newest run of this very command, if it has not come to its end (it may be at work)."""
        shown = [redact_override(override) for override in overrides]
        same = [run for run in self.all() if run.recipe == recipe and run.overrides in (shown, run.pin(shown))]
        return same[-1] if same and same[-1].status not in _CAME_TO_ITS_END else None

    def pareto(self, run_id: str) -> list[dict[str, Any]]:
        """Return the rows of a run's variants by method and bits, as its report shows them; empty without a report."""
        path = self.folder(run_id) / PARETO
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return rows

    def named(self, name: str) -> list[RunRecord]:
        """Return the run with this id; if there is none, those whose ids begin so."""
        runs = self.all()
        return [run for run in runs if run.id == name] or [run for run in runs if run.id.startswith(name)]

    def get(self, name: str | None = None) -> RunRecord:
        """Return the run with this id, or the only one whose id begins so; the newest when None.

        Raises:
            ConfigError: there is no such run, or more than one.
        """
        runs = self.all() if name is None else self.named(name)
        if not runs:
            raise ConfigError(
                "there is no run yet" if name is None else f"there is no run {name!r}",
                hint="`ingot list runs` shows them",
            )
        if name is not None and len(runs) > 1:
            raise ConfigError(f"{name!r} names {len(runs)} runs", hint="`ingot list runs` shows their full ids")
        return runs[-1]
