"""The tracking side of a run at work: facts go to the record on disk, a background thread carries them to MLflow."""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.core import program
from pipelines.core.artifact import Artifact
from pipelines.core.errors import LockedError, Preempted
from pipelines.core.redaction import redact
from pipelines.core.stage import Progress
from pipelines.tracking import record as records
from pipelines.tracking import system_metrics
from pipelines.tracking.client import explain
from pipelines.tracking.config import TrackingConfig, resolve_uri
from pipelines.tracking.feeder import Feeder
from pipelines.tracking.mirror import Mirror, open_mirror
from pipelines.tracking.params import clean
from pipelines.tracking.points import Point, points_of
from pipelines.tracking.record import StageRecord, TrackingRecord

log = logging.getLogger(__name__)

_WAITING_POINTS = 50_000
_ID_WAIT_S = 2.0
_STATUS = {"done": "FINISHED", "refused": "FINISHED", "preempted": "KILLED"}


class StageRun:
    """The child run of one node.

    Args:
        session: the run.
        node: name of the node.
    """

    def __init__(self, session: Session, node: str) -> None:
        self._session = session
        self._node = node

    @property
    def run_id(self) -> str | None:
        """MLflow's id, or None when MLflow does not say within two seconds."""
        return self._session.stage_id(self._node)

    @property
    def url(self) -> str | None:
        """Page of this run in MLflow's interface; None for a database without a server."""
        return self._session.page(self.run_id) if self._session.is_server else None

    def id_within(self, seconds: float) -> str | None:
        """Return MLflow's id, asked for before all that still waits to be sent; None when it takes longer."""
        return self._session.stage_id(self._node, seconds)

    def report(self, progress: Progress) -> None:
        """Take a progress report; costs microseconds, whatever MLflow does."""
        if progress.metrics:
            self._session.feed(self._node, progress)

    def finish(self, artifact: Artifact, *, cached: bool) -> None:
        """Note that the node has its artifact; `cached` when this run found it instead of making it."""
        self._session.finish_stage(self._node, artifact, cached=cached)


class Session:
    """One run as MLflow is to see it. No method raises for MLflow's sake, and none waits for it except `close`.

    Args:
        config: tracking section of the recipe.
        store_root: root of the store.
        record: the facts so far.
        mirrors: False leaves MLflow alone (another process mirrors this run).
    """

    def __init__(
        self, config: TrackingConfig, store_root: Path, record: TrackingRecord, *, mirrors: bool = True
    ) -> None:
        self.uri = resolve_uri(config, store_root)
        self.is_server = self.uri.startswith(("http://", "https://"))
        self._config, self._root, self._record, self._mirrors = config, store_root, record, mirrors
        self._lock = threading.RLock()
        self._points: collections.deque[tuple[str, Point]] = collections.deque(maxlen=_WAITING_POINTS)
        self._mirror: Mirror | None = None
        self._lease = contextlib.ExitStack()
        self._feeder = Feeder(self._flush, describe=lambda error: explain(error, self.uri))
        self._done = not mirrors
        self._save()
        self._opened = self._put(lambda mirror: mirror.open_run())

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the parent run, or None when MLflow does not say within two seconds."""
        self._await(self._opened)
        return self._record.mlflow_id

    @property
    def url(self) -> str | None:
        """Page of the run in MLflow's interface; None for a database without a server."""
        return self.page(self.run_id) if self.is_server else None

    @property
    def pending(self) -> bool:
        """Whether MLflow lacks, or may lack, a part of this run; final after `close`."""
        return self._record.pending if self._done else self._feeder.faults > 0

    @property
    def problem(self) -> str | None:
        """What MLflow's last failure was, in a line without secrets; None when nothing is pending."""
        if not self.pending:
            return None
        return self._feeder.problem or f"it did not keep up within tracking.finish_s = {self._config.finish_s:g} s"

    @contextlib.contextmanager
    def stage(self, node: str, *, fingerprint: str, params: Mapping[str, Any]) -> Iterator[StageRun]:
        """Track one node for the length of the block; an exception inside marks its run as failed."""
        self._begin(node, fingerprint, params)
        try:
            with system_metrics.sampled(lambda found: self._feed_machine(node, found)):
                yield StageRun(self, node)
        except BaseException as error:
            self._end(node, "KILLED" if isinstance(error, Preempted | KeyboardInterrupt) else "FAILED")
            raise
        self._end(node, "FINISHED")

    def log_file(self, path: Path, name: str) -> None:
        """Attach a small file to the parent run."""
        with self._lock:
            self._record.files[name] = str(path.resolve())
            self._save()
        self._put(lambda mirror: mirror.log_file(name))

    def flush(self, timeout_s: float) -> bool:
        """Wait until MLflow has everything reported so far; False when it has not within `timeout_s`."""
        self._put(lambda _mirror: self._flush(), anyway=True).wait(timeout_s)
        return not self._points and not self.pending

    def close(self, status: str) -> None:
        """End the run, wait up to `tracking.finish_s` for MLflow to catch up, and keep the rest for `sync`.

        Args:
            status: done, refused, preempted or failed.
        """
        with self._lock:
            self._record.status = _STATUS.get(status, "FAILED")
            self._save()
        done = self._put(self._complete, anyway=True)
        done.wait(self._config.finish_s)
        self._feeder.stop(timeout_s=1.0)
        self._done = True
        self._lease.close()

    def keep(self, lease: contextlib.ExitStack) -> None:
        """Keep the lease of the run until the session closes."""
        self._lease = lease

    def page(self, mlflow_id: str | None) -> str | None:
        """Return the page of a run in MLflow's interface."""
        if mlflow_id is None or self._mirror is None:
            return None
        return f"{redact(self.uri).rstrip('/')}/#/experiments/{self._mirror.experiment}/runs/{mlflow_id}"

    def stage_id(self, node: str, timeout_s: float = _ID_WAIT_S) -> str | None:
        """Return MLflow's id of a node's run, or None when MLflow does not say in time."""
        if self._record.stages[node].mlflow_id is None and self._mirrors:
            self._await(self._feeder.put(lambda: self._open_stage(node), first=True), timeout_s)
        return self._record.stages[node].mlflow_id

    def feed(self, node: str, progress: Progress) -> None:
        """Queue the metrics of a progress report."""
        now = time.time_ns() // 1_000_000
        self._points.extend((node, p) for p in points_of(progress.metrics, step=progress.done, timestamp_ms=now))

    def _feed_machine(self, node: str, found: dict[str, float]) -> None:
        """Queue what the machine does; the step is the second since the node began, also when another run goes on."""
        now = time.time_ns() // 1_000_000
        second = (now - self._record.stages[node].began_ms) // 1000
        self._points.extend((node, point) for point in points_of(found, step=second, timestamp_ms=now))

    def finish_stage(self, node: str, artifact: Artifact, *, cached: bool) -> None:
        """Note the artifact of a node."""
        with self._lock:
            stage = self._record.stages[node]
            # An attempt that was killed after it published finds its own artifact: this run made it all the same.
            stage.cached = cached and stage.cached is not False
            stage.artifact = artifact.place
            self._save()

    def _begin(self, node: str, fingerprint: str, params: Mapping[str, Any]) -> None:
        with self._lock:
            earlier = self._record.stages.get(node)
            if earlier is None or earlier.fingerprint != fingerprint:
                self._record.stages[node] = StageRecord(
                    fingerprint=fingerprint, params=clean(params), began_ms=time.time_ns() // 1_000_000, new=True
                )
            else:
                earlier.cached = bool(earlier.cached)
                earlier.status = "RUNNING"
            self._save()
        self._put(lambda mirror: mirror.open_stage(node))

    def _end(self, node: str, status: str) -> None:
        with self._lock:
            self._record.stages[node].status = status
            self._save()
        self._put(lambda mirror: mirror.close_stage(node))

    def _put(self, job: Any, *, anyway: bool = False) -> threading.Event:
        if not self._mirrors:
            over = threading.Event()
            over.set()
            return over
        return self._feeder.put(lambda: self._do(job), anyway=anyway)

    def _do(self, job: Any) -> None:
        """Do a job on the feeder's thread, after the metrics that were reported before it."""
        self._flush()
        job(self._connected())
        self._save()

    def _open_stage(self, node: str) -> None:
        self._connected().open_stage(node)
        self._save()

    def _flush(self) -> None:
        points = [self._points.popleft() for _ in range(len(self._points))]
        for node in dict(points):
            mirror = self._connected()
            mirror.log_points(mirror.open_stage(node), [point for name, point in points if name == node])

    def _complete(self, mirror: Mirror) -> None:
        mirror.everything()
        self._record.pending = False

    def _connected(self) -> Mirror:
        if self._mirror is None:
            self._mirror = open_mirror(self._config, self._root, self._record, self._save)
        return self._mirror

    def _await(self, event: threading.Event, timeout_s: float = _ID_WAIT_S) -> None:
        if self._feeder.open:
            event.wait(timeout_s)

    def _save(self) -> None:
        with self._lock:
            try:
                records.save(self._record, self._root)
            except OSError as error:
                log.warning("tracking record not written: %s", error)


def open_session(
    config: TrackingConfig,
    store_root: Path,
    *,
    run_id: str,
    recipe: str,
    params: Mapping[str, Any],
    data_hash: str | None,
) -> Session:
    """Start or continue the tracking of a run.

    A run that did not finish (killed, failed, preempted) is continued, under its old MLflow id, by the next run with
    the same recipe and the same configuration, and by a run with the same id.

    Args:
        config: tracking section of the recipe.
        store_root: root of the store.
        run_id: Ingot's id of the run.
        recipe: its name.
        params: its resolved configuration.
        data_hash: DVC hash of the corpus.
    """
    record = TrackingRecord(
        run_id=run_id,
        recipe=recipe,
        experiment=config.experiment,
        git_commit=program.commit(),
        data_hash=data_hash,
        params=clean(params),
        new=True,
    )
    lease = contextlib.ExitStack()
    try:
        lease.enter_context(records.lease(store_root, run_id))
    except LockedError as error:
        log.warning("%s; this process leaves MLflow to it", error.message)
        return Session(config, store_root, record, mirrors=False)
    _inherit(record, store_root)
    session = Session(config, store_root, record)
    session.keep(lease)
    return session


def _inherit(record: TrackingRecord, store_root: Path) -> None:
    """Take over the MLflow runs and the untold facts of the unfinished run that `record` continues."""
    for earlier in reversed(records.load_all(store_root)):
        same_work = earlier.recipe == record.recipe and earlier.params == record.params
        if earlier.run_id != record.run_id and not same_work:
            continue
        if earlier.status == "FINISHED" and earlier.run_id != record.run_id:
            return
        with contextlib.suppress(LockedError), contextlib.ExitStack() as lease:
            if earlier.run_id != record.run_id:
                lease.enter_context(records.lease(store_root, earlier.run_id))
                records.save(earlier.model_copy(update={"pending": False, "status": "FINISHED"}), store_root)
            record.mlflow_id, record.stages, record.files = earlier.mlflow_id, earlier.stages, earlier.files
            record.new = earlier.new
        return
