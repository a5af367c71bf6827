"""One execution of a plan: what the nodes share while they run. Knows nothing of Prefect."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import executors, planner, preflight
from flows.executors import Executor
from flows.graph import Identified
from flows.run_plan import RunPlan
from flows.run_record import PARETO, REPORT, NodeRecord, RunRecord, Runs, SelectionRecord
from pipelines.core import boundary, stop
from pipelines.core.artifact import Artifact
from pipelines.core.errors import GateRefused, IngotError, Preempted
from pipelines.core.redaction import redact
from pipelines.core.stage import Progress, TrackingTarget
from pipelines.registry import history

if TYPE_CHECKING:
    from pipelines.tracking.session import Session

_SAVE_EVERY_S = 1.0
_ID_WAIT_S = 10.0
"""A registered model lies in the MLflow run of its node; where that is not there in time, in one of its own."""


@dataclass
class Execution:
    """A run at work: its plan, its record, its tracking session, and what carries its requests out."""

    plan: RunPlan
    runs: Runs
    record: RunRecord
    session: Session
    executor: Executor
    console: Callable[[Progress], None]
    wait_s: float | None = None
    """How long to wait for another run of the same stage; None waits for ever."""
    slot: Callable[[RunPlan, str], contextlib.AbstractContextManager[None]] = lambda _plan, _node: (
        contextlib.nullcontext()
    )
    """What a node waits for before it runs, and holds while it does."""
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    """Of the nodes that this run has finished."""
    _saving: threading.Lock = field(default_factory=threading.Lock)
    _saved_at: float = 0.0

    def execute(self, name: str, listen: Callable[[Progress], None] = lambda _progress: None) -> tuple[Artifact, bool]:
        """Have one node executed, or take its artifact from the store.

        Args:
            name: node name.
            listen: receives every progress report, besides console, run record and MLflow.

        Returns:
            The artifact, and whether it came from the store without running.
        """
        node = self.plan.graph[name]
        cached = None if self.plan.selection.forced(node, self.plan.graph) else self._current(node)
        first = node.node.stage.name == "pretrain" or name == f"evaluate.{self.plan.config.base_name}"
        if first and cached is None:
            # The held-out text is known now: hours of work for a candidate that the gate must refuse are saved.
            preflight.refuse([*preflight.held_out(self.plan), *preflight.model_name(self.plan)])
        record = self.record.nodes[name]
        record.state = "running" if cached is None else "cached"
        self._save(at_once=True)
        started = time.monotonic()
        params = node.node.config.model_dump(mode="json")
        with self.session.stage(name, fingerprint=node.fingerprint, params=params) as stage_run:

            def report(progress: Progress) -> None:
                record.done, record.total, record.message = progress.done, progress.total, progress.message
                self._save()
                stage_run.report(progress)
                self.console(progress)
                listen(progress)

            if cached is None:
                tracking = self._tracking(stage_run.id_within(_ID_WAIT_S) if node.node.stage.needs_tracking else None)
                # An artifact that is there all the same is forced anew, or made of inputs that have other bytes now.
                force = self._stored(node) is not None
                request = self.plan.request(name, tracking=tracking, force=force, wait_s=self.wait_s)
                with self.slot(self.plan, name):
                    artifact = self.executor.execute(request, report)
            else:
                artifact = cached
            stage_run.finish(artifact, cached=cached is not None)
        record.state, record.seconds = ("done" if cached is None else "cached"), round(time.monotonic() - started, 1)
        record.summary, record.artifact = artifact.manifest.summary, artifact.place
        self.artifacts[name] = artifact
        self._save(at_once=True)
        return artifact, cached is not None

    def preview(self, name: str) -> list[dict[str, Any]]:
        """Return the table that people see before a node runs: rows about its inputs; empty for none."""
        node = self.plan.graph[name]
        inputs = {key: self.artifacts[s] for key, s in node.node.inputs.items() if s in self.artifacts}
        return node.node.stage.preview_rows(inputs)

    def failed(self, name: str, error: BaseException) -> None:
        """Note in the record that a node ended with an error."""
        record = self.record.nodes[name]
        record.state, record.message = "failed", redact(str(error))
        self._save(at_once=True)

    def report(self) -> Path:
        """Write the run's HTML report and log it to MLflow."""
        from pipelines import report
        from pipelines.report import dvc_files

        for name, node in self.plan.graph.items():
            if name not in self.artifacts and (stored := self._stored(node)):
                self.artifacts[name] = stored
        path = self.runs.folder(self.record.id) / REPORT
        report.write(self.record.model_dump(), self.artifacts, path, self._earlier_training())
        self.runs.publish(path)
        self.session.log_file(path, REPORT)
        table = path.with_name(PARETO)
        if report.write_pareto(self.record.model_dump(), self.artifacts, table):
            self.runs.publish(table)
            self.session.log_file(table, PARETO)
        if folder := self.plan.config.tracking.dvc_files:
            dvc_files.write(self.artifacts, self.plan.project / folder)
        return path

    def _earlier_training(self) -> dict[str, Artifact]:
        """Return the pretraining of the champion before this run, and of the newest run before it, by what they are."""
        model, store = self.plan.config.promote.model_name, self.plan.store
        champions = [str(line["version"]) for line in history.champions(store.root, model)]
        found = {
            f"{name} ({run.id})": store.find("pretrain", run.trained or "")
            for name, run in self.runs.before(self.record, model, champions).items()
        }
        return {name: artifact for name, artifact in found.items() if artifact is not None}

    def _tracking(self, mlflow_run_id: str | None) -> TrackingTarget:
        config = self.plan.config.tracking
        return TrackingTarget(
            uri=self.session.uri, experiment=config.experiment, timeout_s=config.timeout_s, run_id=mlflow_run_id
        )

    def _stored(self, node: Identified) -> Artifact | None:
        return self.plan.store.find(node.node.stage.name, node.fingerprint)

    def _current(self, node: Identified) -> Artifact | None:
        """Return this node's artifact if the store has it, made from the inputs' present bytes."""
        stored = self._stored(node)
        stale = stored is not None and planner.other_bytes(stored, node, self.plan.graph, self.plan.store)
        return None if stale else stored

    def _save(self, *, at_once: bool = False) -> None:
        with self._saving:  # nodes at work side by side share the record
            if at_once or time.monotonic() - self._saved_at > _SAVE_EVERY_S:
                self._saved_at = time.monotonic()
                self.runs.save(self.record, wait=False)


def begin(plan: RunPlan, runs: Runs) -> RunRecord:
    """Start the record of a run: everything that going on with it needs."""
    nodes = {
        name: NodeRecord(stage=node.node.stage.name, fingerprint=node.fingerprint, resume_key=node.resume_key)
        for name, node in plan.graph.items()
    }
    asked = plan.selection
    record = runs.start(
        recipe=plan.recipe,
        overrides=list(plan.overrides),
        config=plan.config.model_dump(mode="json"),
        project=plan.project,
        data_hash=plan.data_hash,
        nodes=nodes,
        settings=plan.config.model_dump(mode="json", exclude_unset=True),
        selection=SelectionRecord(
            only=asked.only,
            since=asked.since,
            force=list(asked.force),
            finished=list(asked.finished),
            keep_going=asked.keep_going,
        ),
    )
    record.init_weights = None if plan.init_weights is None else plan.init_weights.place
    runs.save(record)
    return record


def open_execution(plan: RunPlan, *, console: Callable[[Progress], None], wait_s: float | None = None) -> Execution:
    """Start the record and the tracking session of a run."""
    from pipelines.tracking.session import open_session

    runs = Runs(plan.store.root)
    record = begin(plan, runs)
    session = open_session(
        plan.config.tracking,
        plan.store.root,
        run_id=record.id,
        recipe=plan.recipe,
        params=plan.config.model_dump(mode="json"),
        data_hash=plan.data_hash,
    )
    record.tracking_url, record.tracking_uri = session.url, redact(session.uri)
    runs.save(record)
    return Execution(plan, runs, record, session, executors.get(plan.config.compute), console, wait_s)


@contextlib.contextmanager
def closing(execution: Execution) -> Iterator[None]:
    """Close record, report and tracking session, however the block ends."""
    status, code, message = "failed", 1, None

    def preempted() -> None:
        execution.runs.finish(execution.record, "preempted", Preempted.exit_code, "ended by a second signal")

    try:
        with stop.last_words(preempted):
            yield
        status, code = "done", 0
    except GateRefused as error:
        status, code, message = "refused", error.exit_code, str(error)
        raise
    except Preempted as error:
        status, code, message = "preempted", error.exit_code, str(error)
        raise
    except stop.StopRequested:
        status, code, message = "preempted", Preempted.exit_code, "a signal asked the run to stop"
        raise
    except IngotError as error:
        code, message = error.exit_code, str(error)
        raise
    except Exception as error:
        known = boundary.known(error)
        code, message = (1, repr(error)) if known is None else (known.exit_code, str(known))
        raise
    except BaseException as error:
        message = repr(error)
        raise
    finally:
        with stop.held():  # a stop that is asked for now finds the run at its end
            _close(execution, status, code, message)


def _close(execution: Execution, status: str, code: int, message: str | None) -> None:
    execution.runs.finish(execution.record, status, code, message)
    try:
        if status in {"done", "refused"}:
            execution.report()
    finally:
        execution.session.close(status)
        execution.record.tracking_pending = execution.session.pending
        execution.record.tracking_problem = execution.session.problem
        execution.runs.save(execution.record)
