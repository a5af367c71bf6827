"""Make MLflow equal to a tracking record. Every operation may be repeated: what MLflow has already is not sent again.

Runs are found again by tags before they are created, parameters and points are compared before they are sent; so an
answer that was lost on the way costs nothing but a second look.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.errors import IntegrityError
from pipelines.core.redaction import redact
from pipelines.tracking.client import connect, experiment_id, upload
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.params import flatten
from pipelines.tracking.points import Point, headline, points_of, read_metrics
from pipelines.tracking.record import StageRecord, TrackingRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_ID, NODE, FINGERPRINT = "ingot.run_id", "ingot.node", "ingot.fingerprint"
CACHED, DIGEST = "ingot.cached", "ingot.digest"
PARENT_NODE = "run"
METRICS_FILE = "metrics.jsonl"
_SMALL_FILES = (artifact.MANIFEST, "evaluation.json", "compression.json", "training.json", "decision.json",
                "model_card.md", "report.json", "observations.json", "samples.json", "samples.jsonl")  # fmt: skip
_SMALL_BYTES = 4 << 20
_BATCH, _POINTS_BATCH = 100, 1000
_TAG_LIMIT = 5000
_DATASET_DIGEST_LIMIT = 36


class Mirror:
    """MLflow's side of one run.

    Args:
        client: connection to MLflow.
        experiment: id of the experiment.
        record: what MLflow is to show; the ids of its MLflow runs are written into it.
        save: keeps the record, before anything is created that would have to be found again.
    """

    def __init__(
        self, client: MlflowClient, experiment: str, record: TrackingRecord, save: Callable[[], None] = lambda: None
    ) -> None:
        self._client, self._save = client, save
        self.experiment = experiment
        self._record = record
        self._known: dict[str, dict[str, set[int]]] = {}
        self._opened: set[str] = set()
        self._artifact_uris: dict[str, str] = {}
        self._complete: set[tuple[str, str]] = set()

    def open_run(self) -> str:
        """Find or create the parent run, and return its MLflow id."""
        record = self._record
        tags = {RUN_ID: record.run_id, NODE: PARENT_NODE, "ingot.recipe": record.recipe}
        record.mlflow_id = self._open(record, record.run_id, tags, record.params)
        return record.mlflow_id

    def open_stage(self, node: str) -> str:
        """Find or create the child run of a node, and return its MLflow id."""
        stage = self._record.stages[node]
        tags = {RUN_ID: self._record.run_id, NODE: node, FINGERPRINT: stage.fingerprint}
        parent = {"mlflow.parentRunId": self.open_run()}
        stage.mlflow_id = self._open(stage, node, {**tags, **parent}, stage.params)
        return stage.mlflow_id

    def log_points(self, mlflow_id: str, points: Iterable[Point], *, tags: Sequence[Any] = ()) -> None:
        """Send tags, and the points that MLflow does not have yet; a step that it has keeps its first value."""
        from mlflow.entities import Metric

        fresh = []
        for point in points:
            steps = self._steps(mlflow_id, point.key)
            if point.step not in steps:
                steps.add(point.step)
                fresh.append(Metric(point.key, point.value, point.timestamp_ms, point.step))
        try:
            for index, batch in enumerate(_batches(fresh, _POINTS_BATCH - len(tags)) or [[]] * bool(tags)):
                self._client.log_batch(mlflow_id, metrics=batch, tags=[] if index else tags)
        except BaseException:
            # How much of it arrived is unknown: ask again next time.
            self._known.pop(mlflow_id, None)
            raise

    def close_stage(self, node: str) -> None:
        """Send all that a finished node has to tell: tags, metrics, small files, end."""
        stage = self._record.stages[node]
        if (node, stage.status) in self._complete:
            return
        mlflow_id = self.open_stage(node)
        if stage.artifact is not None:
            self._log_artifact(mlflow_id, node, stage)
        if stage.status != "RUNNING":
            self._client.set_terminated(mlflow_id, stage.status)
            self._complete.add((node, stage.status))

    def log_file(self, name: str) -> None:
        """Send one file of the parent run."""
        self._send_file(self.open_run(), Path(self._record.files[name]), name)

    def everything(self) -> None:
        """Send whatever MLflow may lack, and close the run if it has ended."""
        mlflow_id = self.open_run()
        for node in list(self._record.stages):
            self.close_stage(node)
        for name, path in self._record.files.items():
            if Path(path).is_file():
                self._send_file(mlflow_id, Path(path), name)
        if self._record.status != "RUNNING":
            self._client.set_terminated(mlflow_id, self._record.status)

    def _open(
        self, told: TrackingRecord | StageRecord, name: str, tags: Mapping[str, str], params: Mapping[str, Any]
    ) -> str:
        """Find or create a run; of one that nobody asked for yet, nothing is searched and nothing compared."""
        if told.mlflow_id is not None and told.mlflow_id in self._opened:
            return told.mlflow_id
        tags = {**tags, **self._common_tags()}
        mlflow_id = told.mlflow_id or (None if told.new else self._find(tags))
        if mlflow_id is None:
            told.new = False
            self._save()
            info = self._client.create_run(self.experiment, run_name=name, tags=tags).info
            mlflow_id = str(info.run_id)
            self._artifact_uris[mlflow_id] = str(info.artifact_uri)
            self._known[mlflow_id] = {}
            self._describe(mlflow_id, {}, flatten(params))
        else:
            self._client.update_run(mlflow_id, status="RUNNING")
            present = self._client.get_run(mlflow_id).data
            new_tags = {key: value for key, value in tags.items() if present.tags.get(key) != value}
            self._describe(mlflow_id, new_tags, {k: v for k, v in flatten(params).items() if k not in present.params})
        if self._record.data_hash and tags[NODE] in {PARENT_NODE, "prepare", "pretrain"}:
            self._client.log_inputs(mlflow_id, [dataset_input(self._record.data_hash)])
        self._opened.add(mlflow_id)
        return mlflow_id

    def _common_tags(self) -> dict[str, str]:
        return {
            "mlflow.source.name": "ingot",
            "mlflow.source.git.commit": self._record.git_commit,
            "ingot.data_hash": self._record.data_hash or "",
        }

    def _find(self, tags: Mapping[str, str]) -> str | None:
        wanted = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in (RUN_ID, NODE, FINGERPRINT) if key in tags)
        runs = self._client.search_runs([self.experiment], filter_string=wanted, max_results=1)
        return runs[0].info.run_id if runs else None

    def _describe(self, mlflow_id: str, tags: Mapping[str, str], params: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        new_tags = [RunTag(key, value[:_TAG_LIMIT]) for key, value in tags.items()]
        new_params = [Param(key, value) for key, value in params.items()]
        for index, batch in enumerate(_batches(new_params, _BATCH) or [[]]):
            self._client.log_batch(mlflow_id, params=batch, tags=[] if index else new_tags)

    def _log_artifact(self, mlflow_id: str, node: str, stage: StageRecord) -> None:
        try:
            published = artifact.load(Path(stage.artifact or ""))
        except IntegrityError:
            # Removed by gc, or damaged since: MLflow keeps what it was told while the artifact was there.
            return
        created = _created_ms(published)
        history = published.path / METRICS_FILE
        points: list[Point] = []
        if history.is_file() and not stage.cached:
            points = list(read_metrics(history, timestamp_ms=created))
        curves = {point.key for point in points}
        facts = points_of(published.manifest.summary, step=0, timestamp_ms=created)
        points += [fact for fact in facts if fact.key not in curves]
        self.log_points(mlflow_id, points, tags=_artifact_tags(published, stage))
        overview = headline(node, published.manifest.summary)
        self.log_points(self.open_run(), points_of(overview, step=0, timestamp_ms=created))
        files = {name: published.path / name for name in _SMALL_FILES}
        sent = {n: file for n, file in files.items() if file.is_file() and file.stat().st_size <= _SMALL_BYTES}
        upload(self._client, self._artifact_uri(mlflow_id), sent)

    def _steps(self, mlflow_id: str, key: str) -> set[int]:
        """Return the steps that MLflow has of a metric; asked once, then remembered."""
        known = self._known.get(mlflow_id)
        if known is None:
            known = self._known[mlflow_id] = {
                name: {m.step for m in self._client.get_metric_history(mlflow_id, name)}
                for name in self._client.get_run(mlflow_id).data.metrics
            }
        return known.setdefault(key, set())

    def _send_file(self, mlflow_id: str, path: Path, name: str) -> None:
        base = name.rpartition("/")[2]
        if base == path.name:
            upload(self._client, self._artifact_uri(mlflow_id), {name: path})
            return
        with tempfile.TemporaryDirectory() as scratch:
            copy = shutil.copyfile(path, Path(scratch) / base)
            upload(self._client, self._artifact_uri(mlflow_id), {name: copy})

    def _artifact_uri(self, mlflow_id: str) -> str:
        """Return where a run keeps its files; asked once, then remembered."""
        if mlflow_id not in self._artifact_uris:
            self._artifact_uris[mlflow_id] = self._client.get_run(mlflow_id).info.artifact_uri
        return self._artifact_uris[mlflow_id]


def open_mirror(config: TrackingConfig, store_root: Path, record: TrackingRecord, save: Callable[[], None]) -> Mirror:
    """Connect to MLflow and return its side of a run; see `Mirror`."""
    client = connect(config, store_root)
    return Mirror(client, experiment_id(client, config, store_root), record, save)


def dataset_input(data_hash: str) -> Any:
    """Return MLflow's record of the corpus as training data; its digest is the DVC hash."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": "data.dvc", "dvc_hash": data_hash})
    dataset = Dataset(
        name="data",
        digest=data_hash[:_DATASET_DIGEST_LIMIT],
        source_type="dvc",
        source=source,
        schema=None,
        profile=None,
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _artifact_tags(published: Artifact, stage: StageRecord) -> list[Any]:
    from mlflow.entities import RunTag

    tags = {
        CACHED: "true" if stage.cached else "false",
        DIGEST: published.digest,
        "ingot.artifact": redact(published.place),
        "ingot.artifact_bytes": str(published.size),
    }
    return [RunTag(key, value) for key, value in tags.items()]


def _created_ms(published: Artifact) -> int:
    if published.manifest.provenance is None:
        return 0
    return int(dt.datetime.fromisoformat(published.manifest.provenance.created_at).timestamp() * 1000)


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
