"""A run in MLflow, on a real SQLite database: parent and children, history equal to metrics.jsonl, no secrets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.core.artifact import Artifact
from pipelines.core.errors import Preempted
from pipelines.core.stage import Progress
from pipelines.tracking import record as records
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.session import Session, open_session
from pipelines.tracking.sync import sync

DATA_HASH = "0123456789abcdef0123456789abcdef.dir"
PARAMS = {"pretrain": {"steps": 20, "optimizer": {"name": "lamb"}}, "compress": [{"name": "rtn", "bits": 8}]}


def begin(root: Path, run_id: str = "r1", params: dict[str, Any] | None = None, **config: Any) -> Session:
    """Open a session on the store's own database."""
    return open_session(
        TrackingConfig(**config), root, run_id=run_id, recipe="smoke", params=params or PARAMS, data_hash=DATA_HASH
    )


def live(stage: Any, rows: list[dict[str, Any]]) -> None:
    """Report rows as the flow does while training goes on."""
    for row in rows:
        metrics = {key: value for key, value in row.items() if key != "step"}
        stage.report(Progress("pretrain", row["step"], 20, "steps", metrics=metrics))


def preempted_after(session: Session, rows: list[dict[str, Any]]) -> tuple[str | None, str | None]:
    """Train for some rows, be preempted, and return the ids of the MLflow runs."""
    ids: tuple[str | None, str | None] = (None, None)
    with contextlib.suppress(Preempted), session.stage("pretrain", fingerprint="f" * 64, params={}) as stage:
        live(stage, rows)
        session.flush(30.0)
        ids = (session.run_id, stage.run_id)
        raise Preempted("asked to stop")
    return ids


@pytest.fixture
def client(store_root: Path) -> Any:
    """A second connection, as a user's notebook would open it."""
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{store_root}/mlflow.db")


def test_a_run_is_a_parent_with_one_child_a_stage(
    store_root: Path, client: Any, publish: Callable[..., Artifact], rows: list[dict[str, Any]]
) -> None:
    session = begin(store_root)
    numbers = {"validation_loss": 1.5, "bits_per_byte": 2.0, "ratio": 1.25, "low": 1.0, "seconds": 9.0}
    made = publish(rows, summary=numbers)
    with session.stage("pretrain", fingerprint="f" * 64, params={"steps": 20}) as stage:
        stage.finish(made, cached=False)
    with session.stage("evaluate.rtn", fingerprint="e" * 64, params={}) as stage:
        stage.finish(made, cached=True)
    session.close("done")
    assert session.pending is False
    runs = {run.data.tags["ingot.node"]: run for run in client.search_runs([experiment_of(client)])}
    parent = runs.pop("run")
    assert set(runs) == {"pretrain", "evaluate.rtn"}
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert parent.data.params["pretrain.optimizer.name"] == "lamb"
    assert parent.data.params["compress.rtn.bits"] == "8"
    assert parent.data.metrics == {"train/validation_loss": 1.5, "bits_per_byte/rtn": 2.0, "ratio_to_base/rtn": 1.25}
    assert [runs[n].data.tags["ingot.cached"] for n in ("pretrain", "evaluate.rtn")] == ["false", "true"]
    assert runs["pretrain"].data.tags["ingot.fingerprint"] == "f" * 64
    assert runs["pretrain"].data.tags["ingot.digest"] == made.digest
    assert len(runs["pretrain"].data.tags["mlflow.source.git.commit"]) >= len("unknown")
    assert {run.info.status for run in (parent, *runs.values())} == {"FINISHED"}


def test_the_corpus_is_an_input_with_the_dvc_hash_as_digest(store_root: Path, client: Any) -> None:
    session = begin(store_root)
    assert session.run_id is not None
    session.close("done")
    inputs = client.get_run(session.run_id).inputs.dataset_inputs
    assert [i.dataset.digest for i in inputs] == [DATA_HASH]
    assert {t.key: t.value for t in inputs[0].tags} == {"mlflow.data.context": "training"}


@pytest.mark.parametrize("seen", [0, 7, 20], ids=["nothing live", "part of it live", "all of it live"])
def test_history_equals_metrics_jsonl(
    store_root: Path,
    client: Any,
    publish: Callable[..., Artifact],
    rows: list[dict[str, Any]],
    history_of: Callable[..., Any],
    expected: Callable[..., Any],
    seen: int,
) -> None:
    session = begin(store_root)
    with session.stage("pretrain", fingerprint="f" * 64, params={}) as stage:
        live(stage, rows[:seen])
        session.flush(30.0)
        stage.finish(publish(rows, summary={"family": "decoder"}), cached=False)
        run_id = stage.run_id
    session.close("done")
    assert history_of(client, run_id) == expected(rows)


def test_a_killed_run_goes_on_in_the_same_mlflow_run(
    store_root: Path,
    client: Any,
    publish: Callable[..., Artifact],
    rows: list[dict[str, Any]],
    history_of: Callable[..., Any],
    expected: Callable[..., Any],
) -> None:
    first = begin(store_root, "r1")
    before = preempted_after(first, rows[:9])
    first.close("preempted")
    assert client.get_run(before[1]).info.status == "KILLED"
    second = begin(store_root, "r2")
    with second.stage("pretrain", fingerprint="f" * 64, params={}) as stage:
        live(stage, rows[5:])
        stage.finish(publish(rows, summary={"family": "decoder"}), cached=False)
        after = (second.run_id, stage.run_id)
    second.close("done")
    assert after == before
    assert history_of(client, after[1]) == expected(rows)
    assert client.get_run(after[1]).info.status == "FINISHED"
    assert len(client.search_runs([experiment_of(client)])) == 2


def test_a_finished_run_and_another_configuration_get_runs_of_their_own(store_root: Path) -> None:
    ids = []
    for name, params in (("r1", PARAMS), ("r2", PARAMS), ("r3", {"pretrain": {"steps": 30}})):
        session = begin(store_root, name, params)
        ids.append(session.run_id)
        session.close("done" if name == "r1" else "failed")
    assert len(set(ids)) == 3


def test_two_live_runs_of_one_configuration_stay_apart(store_root: Path) -> None:
    one = begin(store_root, "r1")
    other = begin(store_root, "r2")
    assert one.run_id != other.run_id
    one.close("done")
    other.close("done")


def test_an_artifact_that_a_killed_attempt_published_counts_as_made_by_the_run(
    store_root: Path, client: Any, publish: Callable[..., Artifact], rows: list[dict[str, Any]]
) -> None:
    made = publish(rows)
    first = begin(store_root)
    with pytest.raises(KeyboardInterrupt), first.stage("pretrain", fingerprint="f" * 64, params={}):
        raise KeyboardInterrupt
    first.close("failed")
    second = begin(store_root, "r2")
    with second.stage("pretrain", fingerprint="f" * 64, params={}) as stage:
        stage.finish(made, cached=True)
        run_id = stage.run_id
    second.close("done")
    assert client.get_run(run_id).data.tags["ingot.cached"] == "false"
    assert len(client.get_metric_history(run_id, "loss")) == 20


def test_a_cached_stage_does_not_copy_the_history_of_the_run_that_made_it(
    store_root: Path, client: Any, publish: Callable[..., Artifact], rows: list[dict[str, Any]]
) -> None:
    session = begin(store_root)
    with session.stage("pretrain", fingerprint="f" * 64, params={}) as stage:
        stage.finish(publish(rows), cached=True)
    session.close("done")
    assert client.get_run(stage.run_id).data.metrics == {"final/loss": 1.5}


def test_files_are_attached_under_the_name_given(store_root: Path, client: Any, tmp_path: Path) -> None:
    report = tmp_path / "page.html"
    report.write_text("<p>hello</p>")
    session = begin(store_root)
    session.log_file(report, "reports/report.html")
    session.close("done")
    found = client.download_artifacts(session.run_id, "reports/report.html", str(tmp_path))
    assert Path(found).read_text() == "<p>hello</p>"
    assert (store_root / "mlartifacts").is_dir()


def test_no_secret_reaches_anything_that_is_stored(
    store_root: Path, monkeypatch: pytest.MonkeyPatch, publish: Callable[..., Artifact]
) -> None:
    canaries = [f"c4n4ry{n}Zq81" for n in range(4)]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", canaries[0])
    params = {
        "store": {"endpoint": f"https://user:{canaries[1]}@s3.example", "note": f"uses {canaries[0]}"},
        "tracking": {"token": canaries[2]},
        "extra": [{"password": canaries[3]}],
    }
    session = begin(store_root, params=params)
    with pytest.raises(RuntimeError), session.stage("pretrain", fingerprint="f" * 64, params=params):
        raise RuntimeError(f"403 from https://u:{canaries[1]}@s3.example with {canaries[0]}")
    session.close("failed")
    assert session.run_id is not None
    written = [path for path in store_root.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in written)
    for path in written:
        content = path.read_bytes()
        assert not [c for c in canaries if c.encode() in content], path


def test_a_run_that_never_closed_is_completed_by_sync(
    store_root: Path, client: Any, publish: Callable[..., Artifact], rows: list[dict[str, Any]]
) -> None:
    made = publish(rows)
    record = records.TrackingRecord(
        run_id="dead",
        recipe="smoke",
        experiment="ingot",
        git_commit="unknown",
        stages={"pretrain": records.StageRecord(fingerprint="f" * 64, artifact=str(made.path), cached=False)},
    )
    records.save(record, store_root)
    assert [(r.run_id, r.synced) for r in sync(TrackingConfig(), store_root)] == [("dead", True)]
    assert sync(TrackingConfig(), store_root) == []
    runs = {run.data.tags["ingot.node"]: run for run in client.search_runs([experiment_of(client)])}
    assert {name: run.info.status for name, run in runs.items()} == {"run": "KILLED", "pretrain": "KILLED"}
    assert len(client.get_metric_history(runs["pretrain"].info.run_id, "loss")) == 20


def test_sync_leaves_a_run_at_work_alone(store_root: Path) -> None:
    session = begin(store_root)
    assert [(r.run_id, r.message) for r in sync(TrackingConfig(), store_root)] == [("r1", "at work")]
    session.close("done")
    assert sync(TrackingConfig(), store_root) == []


def test_syncing_twice_changes_nothing(
    store_root: Path,
    client: Any,
    publish: Callable[..., Artifact],
    rows: list[dict[str, Any]],
    history_of: Callable[..., Any],
) -> None:
    session = begin(store_root)
    with session.stage("pretrain", fingerprint="f" * 64, params={"a": 1}) as stage:
        stage.finish(publish(rows), cached=False)
        run_id = stage.run_id
    session.close("done")
    once = history_of(client, run_id)
    again = records.load(store_root, "r1")
    assert again is not None
    records.save(again.model_copy(update={"pending": True}), store_root)
    assert sync(TrackingConfig(), store_root)[0].synced
    assert history_of(client, run_id) == once


def experiment_of(client: Any) -> str:
    """Return the id of the experiment that the sessions log to."""
    return str(client.get_experiment_by_name("ingot").experiment_id)
