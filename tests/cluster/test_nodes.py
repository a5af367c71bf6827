"""One training over two nodes of a real Slurm: the same bytes, whatever happens to a rank or a node meanwhile."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flows import executors
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import Preempted, TransientError
from pipelines.core.fingerprint import digest
from pipelines.core.request import ArtifactRef, StageRequest
from pipelines.core.store import LocalStore
from pipelines.stages import STAGES
from pipelines.training.config import PretrainConfig
from pipelines.training.metrics import read_records
from tests.cluster.slurm_servers import Slurm, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.cluster_full]

SETTINGS: dict[str, Any] = {
    "preset": "0.5m",
    "model": {"width": 32, "layers": 2, "heads": 2, "ffn_width": 44},
    "steps": 12,
    "batch_size": 8,
    "micro_batch_size": 2,
    "validate_every": 6,
    "validation_sequences": 5,
    "schedule": {"warmup": 2},
    "checkpoint": {"every": 3},
    "world_size": 2,
}


def compute(nodes: int, **more: Any) -> ComputeConfig:
    table = {"executor": "slurm", "device": "cpu", "grace_s": 10.0, "nodes": nodes, "cpus": 2, "node_timeout_s": 10.0}
    return ComputeConfig.model_validate(table | more)


@pytest.fixture
def training(prepared: Artifact, tmp_path: Path) -> Callable[..., StageRequest]:
    """The request for one training, in a store that has its input."""
    store = LocalStore(tmp_path / "store")
    shutil.copytree(prepared.path, store.path("prepare", prepared.manifest.fingerprint))

    def make(nodes: int, **changes: Any) -> StageRequest:
        used = {"prepare": ArtifactRef(stage="prepare", fingerprint=prepared.manifest.fingerprint)}
        config = PretrainConfig.model_validate(SETTINGS | changes)
        keys = {name: each.fingerprint for name, each in used.items()}
        return StageRequest(
            stage="pretrain",
            node="pretrain",
            fingerprint=digest(STAGES["pretrain"].identity(config, keys)),
            configuration=SETTINGS | changes,
            inputs=used,
            data_hash="tiny",
            store=str(store.root),
            project=str(tmp_path),
            compute=compute(nodes),
        )

    return make


@pytest.fixture(scope="module")
def undisturbed(prepared: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same training on this machine, by nobody disturbed."""
    root = tmp_path_factory.mktemp("undisturbed")
    made: Callable[..., StageRequest] = training.__wrapped__(prepared, root)  # type: ignore[attr-defined]
    return executors.get(ComputeConfig()).execute(made(1), lambda _progress: None)


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have faults injected into the ranks of the next jobs."""

    def inject(*planned: dict[str, Any]) -> None:
        plan = tmp_path / "faults.json"
        plan.write_text(json.dumps(planned))
        monkeypatch.setenv("INGOT_FAULTS", str(plan))

    return inject


def step_of(request: StageRequest) -> int:
    """The last step that its unfinished training has recorded."""
    records = [r["step"] for p in Path(request.store).glob("scratch/*/metrics.jsonl") for r in read_records(p)]
    return max(records, default=0)


def test_a_rank_that_dies_on_one_node_is_named_and_the_run_goes_on_on_two_nodes(
    slurm: Slurm, training: Callable[..., StageRequest], undisturbed: Artifact, faults: Callable[..., None]
) -> None:
    executor = executors.get(compute(2))
    faults({"point": "train.after_step", "rank": 1, "step": 7, "action": "SIGKILL"})
    with pytest.raises(TransientError, match=r"rank 1 of 2 on node 1 \(n2, .*\) was killed by SIGKILL"):
        executor.execute(training(2), lambda _progress: None)
    made = executor.execute(training(2), lambda _progress: None)
    assert made.read_json("observations.json")["resumed_at"] == [6]
    assert made.digest == undisturbed.digest


def test_a_training_that_was_cancelled_on_two_nodes_goes_on_on_one(
    slurm: Slurm, training: Callable[..., StageRequest], undisturbed: Artifact, faults: Callable[..., None]
) -> None:
    executor = executors.get(compute(2))
    faults({"point": "train.after_step", "rank": 1, "step": 7, "action": "delay", "seconds": 3.0})
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(executor.execute, training(2), lambda _progress: None)
        wait_for(lambda: step_of(training(2)) >= 6, "the training to be under way", 120)
        started = time.monotonic()
        executor.stop()
        assert time.monotonic() - started < 15
        assert slurm.active() == []
        with pytest.raises(Preempted):
            future.result(60)
    made = executors.get(compute(1)).execute(training(1), lambda _progress: None)
    (resumed,) = made.read_json("observations.json")["resumed_at"]
    assert resumed >= 6
    assert made.digest == undisturbed.digest


def test_a_node_that_is_gone_is_named_and_the_run_goes_on_when_it_is_back(
    slurm: Slurm, training: Callable[..., StageRequest], undisturbed: Artifact, faults: Callable[..., None]
) -> None:
    executor = executors.get(compute(2))
    faults({"point": "train.after_step", "rank": 1, "step": 7, "action": "delay", "seconds": 20.0})
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(executor.execute, training(2), lambda _progress: None)
        wait_for(lambda: step_of(training(2)) >= 6, "the training to be under way", 120)
        slurm.kill_node("n2")
        started = time.monotonic()
        with pytest.raises(TransientError, match=r"node 1 \(n2, .*\) was lost|NODE_FAIL"):
            future.result(120)
        assert time.monotonic() - started < 15
    slurm.start_node("n2")
    wait_for(lambda: slurm.states() == {"n1": "idle", "n2": "idle"}, "the node to be back", 120)
    made = executor.execute(training(2), lambda _progress: None)
    assert made.read_json("observations.json")["resumed_at"] == [6]
    assert made.digest == undisturbed.digest
