"""Binding to real DeepSpeed engines on two ranks: what is refused and why, and masters pushed to live weights.

That the bound optimizers compute the right numbers is shown in tests/exactness.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.core.errors import ConfigError
from pipelines.training.zero_binding import skip_shared_memory_build

pytestmark = pytest.mark.timeout(600)
WORLD = 2


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Run the plain script on two ranks; returns what each wrote."""
    out = tmp_path_factory.mktemp("fragments")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(Path(__file__).with_name("fragments_worker.py")), str(out)]
    processes = []
    for rank in range(WORLD):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        with (out / f"log{rank}.txt").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(500) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((out / f"log{rank}.txt").read_text()[-3000:] for rank in range(WORLD))
    assert codes == [0] * WORLD, logs
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("foreign optimizer", "the engine's optimizer is AdamW\n  -> pass Lamb, Lars or AdamW of models.optim"),
        ("round robin", "round_robin_gradients reorders the flat buffers but not their addresses"),
        ("clipped twice", "both by the engine (gradient_clipping) and by the optimizer (max_grad_norm)"),
        ("bf16 without ZeRO", "FP16_UnfusedOptimizer is a DeepSpeed optimizer whose layout is not known here"),
        ("half-precision masters", "masters in half precision round small updates away"),
        ("shifted address", "the fp32 master at DeepSpeed's address is not the live weight"),
        ("swapped addresses", "the fp32 master at DeepSpeed's address is not the live weight"),
        ("experts", "mixture-of-experts layers are reduced over other process groups"),
        ("pipeline", "pipeline parallelism spreads layers over ranks"),
        ("Megatron", "tensor parallelism splits tensors over ranks that norms are not summed over"),
        ("AutoTP", "tensor parallelism splits tensors over ranks that norms are not summed over"),
        ("Ulysses", "sequence parallelism uses other process groups"),
    ],
)
def test_what_cannot_be_served_is_refused_on_all_ranks_with_the_reason(
    case: str, reason: str, facts: list[dict[str, Any]]
) -> None:
    for rank in facts:
        assert rank["refusals"][case].startswith("ConfigError: ")
        assert reason in rank["refusals"][case]


@pytest.mark.parametrize(
    ("case", "culprit", "reason"),
    [
        ("clipped twice on rank 1", 1, "both by the engine (gradient_clipping) and by the optimizer (max_grad_norm)"),
        ("no single_partition_of_fp32_groups in ZeRO-1", 0, "lays out DeepSpeedZeroOptimizer in an unknown way"),
        ("no real_dp_process_group in ZeRO-2", 0, "lays out DeepSpeedZeroOptimizer in an unknown way"),
        ("no grad_position in ZeRO-3", 0, "lays out DeepSpeedZeroOptimizer_Stage3 in an unknown way"),
    ],
)
def test_what_one_rank_cannot_serve_is_refused_on_the_others_too(
    case: str, culprit: int, reason: str, facts: list[dict[str, Any]]
) -> None:
    assert reason in facts[culprit]["refusals"][case]
    assert facts[1 - culprit]["refusals"][case].startswith("ConfigError: 1 of 2 ranks cannot bind the optimizer")


@pytest.mark.parametrize("stage", ["z0", "z1", "z2", "z3"])
def test_loaded_masters_reach_the_live_weights_and_training_goes_on(stage: str, facts: list[dict[str, Any]]) -> None:
    assert all(all(rank["refreshed"][stage].values()) for rank in facts)


@pytest.mark.parametrize("stage", ["z1", "z2", "z3"])
def test_loaded_masters_reach_the_live_weights_under_offload(stage: str, facts: list[dict[str, Any]]) -> None:
    assert all(all(rank["refreshed_offloaded"][stage].values()) for rank in facts)


@pytest.mark.parametrize("wrapper", ["BF16_Optimizer1", "DeepSpeedZeroOptimizer2", "DeepSpeedZeroOptimizer_Stage33"])
def test_half_precision_weights_train_through_fp32_masters(wrapper: str, facts: list[dict[str, Any]]) -> None:
    for rank in facts:
        losses = rank["half_precision"][wrapper]
        assert losses[-1] < 0.7 * losses[0]


def test_half_precision_gives_the_same_losses_at_every_stage(facts: list[dict[str, Any]]) -> None:
    one, two, three = facts[0]["half_precision"].values()
    assert one == pytest.approx(two, rel=1e-3)
    assert one == pytest.approx(three, rel=1e-3)


def test_an_optimizer_made_by_a_callable_is_bound_by_the_models_names(facts: list[dict[str, Any]]) -> None:
    assert all(rank["by_callable"] > 0 for rank in facts)


def test_a_deepspeed_that_names_its_extensions_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting an unknown name would do nothing, and the first run would compile for minutes, or wait for ever."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    deepspeed = pytest.importorskip("deepspeed")
    extensions = deepspeed.ops.__compatible_ops__
    monkeypatch.setitem(extensions, "deepspeed_shm_comm", True)
    skip_shared_memory_build()
    assert extensions["deepspeed_shm_comm"] is False
    monkeypatch.delitem(extensions, "deepspeed_shm_comm")
    with pytest.raises(ConfigError, match="lists its extensions in an unknown way"):
        skip_shared_memory_build()
