"""One execution of the graph: what the nodes share while they run. Knows nothing of Prefect."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import planner
from flows.config import RunConfig
from flows.graph import Identified, identify, init_weights_of
from flows.planner import Selection
from flows.run_record import PARETO, REPORT, NodeRecord, RunRecord, Runs
from pipelines.core.artifact import Artifact
from pipelines.core.errors import GateRefused, IngotError, Preempted
from pipelines.core.provenance import CHECKOUT
from pipelines.core.run_stage import materialize
from pipelines.core.stage import Progress, StageContext, TrackingTarget
from pipelines.core.store import Store
from pipelines.data import versioning

_SAVE_EVERY_S = 1.0
_FLUSH_S = 10.0


@dataclass
class Execution:
    """A run at work: graph, store, record and tracking session."""

    config: RunConfig
    data_hash: str
    graph: Mapping[str, Identified]
    store: Store
    runs: Runs
    record: RunRecord
    session: Any
    """MLflow session; see `pipelines.tracking`."""
    selection: Selection
    console: Callable[[Progress], None]
    wait_s: float | None = None
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    _saved_at: float = 0.0

    def wanted(self) -> list[str]:
        """Return the names of the nodes to execute, in order."""
        return [name for name, node in self.graph.items() if not self.selection.leaves_out(node)]

    def execute(self, name: str, listen: Callable[[Progress], None] = lambda _progress: None) -> tuple[Artifact, bool]:
        """Run or fetch one node.

        Args:
            name: node name.
            listen: receives every progress report, besides console, run record and MLflow.

        Returns:
            The artifact, and whether it came from the store without running.
        """
        node = self.graph[name]
        force = self.selection.forced(node, self.graph)
        cached = not force and self._current(node)
        record = self.record.nodes[name]
        record.state = "cached" if cached else "running"
        self._save(at_once=True)
        started = time.monotonic()
        if name == "prepare" and not cached:
            versioning.ensure(self.config.data, CHECKOUT)
        if name == "promote":
            # A version names the MLflow run that made it, so MLflow has to know that run first.
            self.session.flush(_FLUSH_S)
        with self.session.stage(
            name, fingerprint=node.fingerprint, params=node.node.config.model_dump(mode="json")
        ) as stage_run:

            def report(progress: Progress) -> None:
                record.done, record.total, record.message = progress.done, progress.total, progress.message
                self._save()
                stage_run.report(progress)
                self.console(progress)
                listen(progress)

            found = materialize(
                node.node.stage,
                node.node.config,
                self._inputs(node),
                self.store,
                self._context(name, report, stage_run.run_id),
                input_keys=node.input_keys,
                data_hash=None if name == "fetch" else self.data_hash,
                force=force or (self.store.find(node.node.stage.name, node.fingerprint) is not None and not cached),
                wait_s=self.wait_s,
            )
            stage_run.finish(found, cached=bool(cached))
        record.state, record.seconds = ("cached" if cached else "done"), round(time.monotonic() - started, 1)
        record.summary, record.artifact = found.manifest.summary, str(found.path)
        self._save(at_once=True)
        self.artifacts[name] = found
        return found, bool(cached)

    def failed(self, name: str, error: BaseException) -> None:
        """Note in the record that a node ended with an error."""
        record = self.record.nodes[name]
        record.state, record.message = "failed", str(error)
        self._save(at_once=True)

    def report(self) -> Path:
        """Write the run's HTML report and log it to MLflow."""
        from pipelines import report

        for name, node in self.graph.items():
            if name not in self.artifacts and (found := self.store.find(node.node.stage.name, node.fingerprint)):
                self.artifacts[name] = found
        path = self.runs.folder(self.record.id) / REPORT
        report.write(self.record.model_dump(), self.artifacts, path)
        self.session.log_file(path, REPORT)
        table = path.with_name(PARETO)
        if report.write_pareto(self.record.model_dump(), self.artifacts, table):
            self.session.log_file(table, PARETO)
        return path

    def _current(self, node: Identified) -> bool:
        """Return whether the store has this node's artifact, made from the inputs' present bytes."""
        found = self.store.find(node.node.stage.name, node.fingerprint)
        return found is not None and planner.other_bytes(found, node, self.graph, self.store) is None

    def _inputs(self, node: Identified) -> dict[str, Artifact]:
        return {key: self._artifact(source) for key, source in node.node.inputs.items()}

    def _artifact(self, name: str) -> Artifact:
        """Return the artifact of a node of this run, or the one in the store when this run does not execute it."""
        node = self.graph[name]
        found = self.artifacts.get(name) or self.store.find(node.node.stage.name, node.fingerprint)
        if found is None:
            raise IngotError(f"{name} has no artifact yet", hint="run without --only, or run that stage first")
        return found

    def _context(self, name: str, report: Callable[[Progress], None], mlflow_run_id: str | None) -> StageContext:
        tracking = TrackingTarget(
            uri=self.session.uri,
            experiment=self.config.tracking.experiment,
            timeout_s=self.config.tracking.timeout_s,
            run_id=mlflow_run_id,
        )
        return StageContext(
            node=name,
            scratch=self.store.root,
            report=report,
            compute=self.config.compute,
            tracking=tracking,
            store=self.store.root,
        )

    def _save(self, *, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._saved_at > _SAVE_EVERY_S:
            self._saved_at = time.monotonic()
            self.runs.save(self.record)


def open_execution(
    config: RunConfig,
    *,
    recipe: str,
    overrides: list[str],
    selection: Selection,
    console: Callable[[Progress], None],
    wait_s: float | None = None,
) -> Execution:
    """Start the record and the tracking session of a run."""
    from pipelines import tracking

    data_hash = versioning.data_hash(config.data, CHECKOUT)
    store = Store(CHECKOUT / config.store.path)
    start = init_weights_of(config, store.root)
    graph = identify(config, data_hash, start)
    selection.check(graph)
    runs = Runs(store.root)
    resolved = config.model_dump(mode="json")
    nodes = {n: NodeRecord(stage=i.node.stage.name, fingerprint=i.fingerprint) for n, i in graph.items()}
    record = runs.start(recipe=recipe, overrides=overrides, config=resolved, data_hash=data_hash, nodes=nodes)
    session = tracking.open_session(
        config.tracking, store.root, run_id=record.id, recipe=recipe, params=resolved, data_hash=data_hash
    )
    record.tracking_url, record.init_weights = session.url, start.place if start is not None else None
    runs.save(record)
    return Execution(config, data_hash, graph, store, runs, record, session, selection, console, wait_s)


@contextlib.contextmanager
def closing(execution: Execution) -> Iterator[None]:
    """Close record, report and tracking session, however the block ends."""
    status, code, message = "failed", 1, None
    try:
        yield
        status, code = "done", 0
    except GateRefused as error:
        status, code, message = "refused", error.exit_code, str(error)
        raise
    except Preempted as error:
        status, code, message = "preempted", error.exit_code, str(error)
        raise
    except IngotError as error:
        code, message = error.exit_code, str(error)
        raise
    except BaseException as error:
        message = repr(error)
        raise
    finally:
        execution.runs.finish(execution.record, status, code, message)
        try:
            if status in {"done", "refused"}:
                execution.report()
        finally:
            execution.session.close(status)
            execution.record.tracking_pending = execution.session.pending
            execution.runs.save(execution.record)
