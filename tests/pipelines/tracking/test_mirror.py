"""The mirror: repeating any operation, also one whose answer was lost, changes nothing in MLflow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.core.artifact import Artifact
from pipelines.tracking.client import connect, experiment_id
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.mirror import Mirror
from pipelines.tracking.points import Point
from pipelines.tracking.record import StageRecord, TrackingRecord


class LosesAnswers:
    """A client whose calls of one name reach MLflow, but whose first answer is lost on the way back.

    Args:
        client: the real client.
        method: name of the method.
    """

    def __init__(self, client: Any, method: str) -> None:
        self._client = client
        self._method = method
        self._lost = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)
        if name != self._method:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            answer = real(*arguments, **options)
            if not self._lost:
                self._lost = True
                raise ConnectionResetError("the answer was lost")
            return answer

        return call


@pytest.fixture
def client(store_root: Path) -> Any:
    """A client of the store's database."""
    return connect(TrackingConfig(), store_root)


@pytest.fixture
def experiment(client: Any, store_root: Path) -> str:
    """The experiment's id."""
    return experiment_id(client, TrackingConfig(), store_root)


@pytest.fixture
def record(publish: Callable[..., Artifact], rows: list[dict[str, Any]]) -> TrackingRecord:
    """A run with one finished stage."""
    made = publish(rows, summary={"family": "decoder", "bits": 2.5})
    params = {f"p{n}": n for n in range(150)}
    stage = StageRecord(fingerprint="f" * 64, params=params, artifact=str(made.path), cached=False, status="FINISHED")
    return TrackingRecord(
        run_id="r1", recipe="smoke", experiment="ingot", git_commit="abc", stages={"pretrain": stage}, status="FINISHED"
    )


def everything_in(client: Any, experiment: str) -> list[tuple[Any, ...]]:
    """Return all that MLflow has of an experiment, in a form that compares."""
    found = []
    for run in client.search_runs([experiment]):
        run_id = run.info.run_id
        history = {n: [(m.step, m.value) for m in client.get_metric_history(run_id, n)] for n in run.data.metrics}
        files = [item.path for item in client.list_artifacts(run_id)]
        found.append((run.data.tags["ingot.node"], run.info.status, run.data.params, history, files))
    return sorted(found, key=lambda one: str(one[0]))


@pytest.mark.parametrize("method", ["create_run", "log_batch", "log_inputs", "set_terminated"])
def test_a_lost_answer_costs_nothing_but_a_second_look(
    client: Any, experiment: str, record: TrackingRecord, method: str
) -> None:
    record = record.model_copy(update={"data_hash": "0" * 32 + ".dir"})
    mirror = Mirror(LosesAnswers(client, method), experiment, record)  # type: ignore[arg-type]
    with pytest.raises(ConnectionResetError):
        mirror.everything()
    mirror.everything()
    (stage, run) = everything_in(client, experiment)
    assert (run[0], run[1], stage[0], stage[1]) == ("run", "FINISHED", "pretrain", "FINISHED")
    assert len(stage[2]) == 150
    assert [step for step, _ in stage[3]["loss"]] == list(range(1, 21))
    assert "manifest.json" in stage[4]


def test_everything_twice_by_two_processes_is_everything_once(
    client: Any, experiment: str, record: TrackingRecord
) -> None:
    Mirror(client, experiment, record.model_copy(deep=True)).everything()
    once = everything_in(client, experiment)
    Mirror(client, experiment, record.model_copy(deep=True)).everything()
    assert everything_in(client, experiment) == once


def test_a_step_that_mlflow_has_keeps_its_first_value(client: Any, experiment: str, record: TrackingRecord) -> None:
    run_id = Mirror(client, experiment, record).open_run()
    Mirror(client, experiment, record).log_points(run_id, [Point("tokens_per_s", 100.0, 1, 5)])
    Mirror(client, experiment, record).log_points(run_id, [Point("tokens_per_s", 90.0, s, 9) for s in (1, 2)])
    history = client.get_metric_history(run_id, "tokens_per_s")
    assert sorted((m.step, m.value) for m in history) == [(1, 100.0), (2, 90.0)]


def test_more_points_than_a_batch_holds_all_arrive(client: Any, experiment: str, record: TrackingRecord) -> None:
    mirror = Mirror(client, experiment, record)
    run_id = mirror.open_run()
    mirror.log_points(run_id, [Point("loss", float(s), s, 0) for s in range(2500)])
    assert len(client.get_metric_history(run_id, "loss")) == 2500


def test_an_artifact_that_gc_removed_is_no_reason_to_fail(client: Any, experiment: str, record: TrackingRecord) -> None:
    record.stages["pretrain"].artifact = "/nowhere/at/all"
    Mirror(client, experiment, record).everything()
    assert [one[1] for one in everything_in(client, experiment)] == ["FINISHED", "FINISHED"]


def test_two_creators_of_an_experiment_find_the_same_one(client: Any, store_root: Path) -> None:
    first = experiment_id(client, TrackingConfig(experiment="shared"), store_root)
    assert experiment_id(client, TrackingConfig(experiment="shared"), store_root) == first
    found = client.get_experiment(first)
    assert found.artifact_location.startswith((store_root / "mlartifacts").as_uri())
