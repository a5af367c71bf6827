"""What training buys on the bench model, beside what rounding and cutting give without it.

Measured when written, perplexity over the parent's on the bench's held-out text, 100 steps of 12 sequences, one seed:

    continued fp32 0.997 (lr 5e-4)
    2 bits   SEQ 1.026, LSQ 1.112; without training SEQ 1.087, RTN 1.111 (2.019 without a search), GPTQ 1.036
    3 bits   1.016
    SortedNet cut to 1 of 3 layers 1.249; the parent cut there 1.481; that depth trained alone 1.215
    a student of 2 of 3 layers, 60 steps: taught 1.063, by labels only 1.085, untrained 1.183
    PB-LLM, 10 % salient, 60 steps: trained 1.035, rounded 1.131, compensated 1.092; continued fp32 1.016 and
    compensated then 1.109 (1.099 at lr 5e-4); without salient weights trained 1.118, rounded 1.983
    a quarter of the weights, 60 steps: Maestro 1.228, SVD then trained 1.105, SVD alone 1.378

The methods page's bound, below 0.7 of round to nearest at 2 bits, is for a grid that spans the largest weight, and
holds against that (2.019). That SortedNet costs nothing against a depth trained alone does not hold here,
nor that Maestro's order is worth more than the same steps after a truncated SVD.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.compression import qat
from pipelines.compression.config import CompressConfig
from pipelines.compression.run import CompressionRun
from pipelines.compression.stage import run
from pipelines.core.compute import ComputeConfig
from pipelines.core.stage import StageContext
from pipelines.modelio.load import load_model
from pipelines.training import worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SCHEDULE: dict[str, Any] = {"engine": "plain", "world_size": 1, "zero_stage": 0, "batch_size": 12}
SCHEDULE |= {"micro_batch_size": 12, "steps": 100, "lr": 1e-3, "baselines": False, "validation_sequences": 16}
SCHEDULE |= {"validate_every": 1000, "checkpoint_every": 1000}


@pytest.fixture
def ratio(bench: Any, tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], float]]:
    """Make a child, trained in this process, and return its perplexity over the parent's."""
    threads, handlers = torch.get_num_threads(), {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    base = bench.loss(load_model(bench.parent.path / "model"))
    inputs = {"prepare": bench.prepare, "model": bench.parent}

    def make(table: dict[str, Any]) -> float:
        place = tmp_path / f"child-{len(list(tmp_path.glob('child-*')))}"
        (place / "out").mkdir(parents=True)
        context = StageContext("compress.x", place / "scratch", compute=ComputeConfig(device="cpu"))
        config = CompressConfig.model_validate(table)
        if table.get("steps"):
            spec = qat.make_worker_spec(CompressionRun.open(config, inputs, place / "out", context, run))
            qat.training.write_spec(spec)
            assert worker.main([str(spec.scratch / "worker_spec.json")]) == 0
        run(config, inputs, place / "out", context)
        return math.exp(bench.loss(load_model(place / "out" / "model")) - base)

    yield make
    torch.use_deterministic_algorithms(mode=False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_two_bits_trained_beat_two_bits_rounded_and_stretched_levels_beat_lsq(
    ratio: Callable[[dict[str, Any]], float],
) -> None:
    rounded = {name: ratio({"method": name, "bits": 2, "group_size": 0}) for name in ("rtn", "gptq")}
    assert rounded["rtn"] > 1.05, "two bits must hurt, or nothing is compared"
    spanning = ratio({"method": "rtn", "bits": 2, "group_size": 0, "clip": "max"})
    seq = ratio({"method": "paretoq", "bits": 2, **SCHEDULE})
    assert seq < 0.7 * spanning
    assert seq < rounded["gptq"] < rounded["rtn"]
    assert seq - 1 < 0.4 * (rounded["rtn"] - 1)
    assert seq < ratio({"method": "paretoq", "bits": 2, "quantizer": "lsq", **SCHEDULE})


def test_a_sorted_model_survives_a_cut_that_its_parent_does_not(ratio: Callable[[dict[str, Any]], float]) -> None:
    cut = ratio({"method": "sortednet", "depth": 1, **SCHEDULE, "steps": 0})
    assert cut > 1.3, "the cut must hurt, or nothing is compared"
    assert ratio({"method": "sortednet", "depth": 1, **SCHEDULE}) < 0.9 * cut


def test_a_taught_student_is_ahead_of_one_that_sees_labels_only(ratio: Callable[[dict[str, Any]], float]) -> None:
    """The same student, start, data and number of steps; one seed."""
    table = {"method": "distill", "layers": 2, **SCHEDULE, "steps": 60}
    untrained = ratio(table | {"steps": 0})
    assert untrained > 1.1, "the student must have something to learn"
    labels = ratio(table | {"soft": 0.0})
    assert ratio(table) - 1 < 0.85 * (labels - 1)
    assert labels < untrained


def test_trained_factors_beat_the_truncated_svd(
    ratio: Callable[[dict[str, Any]], float],
) -> None:
    table = {"method": "maestro", "share": 0.25, "value_bits": 32, "cut": "start", **SCHEDULE, "steps": 60}
    plain = ratio(table | {"steps": 0})
    assert plain > 1.2, "the cut must hurt, or nothing is compared"
    assert ratio(table) - 1 < 0.5 * (plain - 1)
    assert ratio(table | {"cut": "end"}) - 1 < 0.8 * (plain - 1)


def test_partly_binary_weights_gain_by_training_more_than_by_compensation(
    ratio: Callable[[dict[str, Any]], float],
) -> None:
    """At equal bytes."""
    table = {"method": "pb_llm_tune", "salient": 0.1, **SCHEDULE, "steps": 60}
    rounded, compensated = ratio(table | {"steps": 0}), ratio({"method": "pb_llm", "salient": 0.1})
    assert rounded > compensated > 1.05, "so few bits must hurt, or nothing is compared"
    tuned = ratio(table)
    assert tuned - 1 < 0.6 * (compensated - 1)
    assert tuned - 1 < 0.4 * (rounded - 1)
