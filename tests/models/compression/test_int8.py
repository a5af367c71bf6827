"""The 8-bit workflow on one layer: weights by channel, inputs by calibrated tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.compression import int8
from models.compression.base import Statistics
from models.compression.solvers import range_calibrators

FIXED = ["max", "p99.9", "p99.99", "p99.999", "p99.9999", "entropy", "mse"]


def statistics(rows: Tensor) -> Statistics:
    return Statistics(rows.double().T @ rows.double(), len(rows), inputs_NI=rows)


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Statistics]:
    """A weight [24, 64], and inputs with a long tail."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 64, generator=generator)
    rows[3, 5] = 40.0
    return torch.randn(24, 64, generator=generator), statistics(rows)


def test_weights_are_rounded_to_127_steps_of_their_row(layer: tuple[Tensor, Statistics]) -> None:
    weight, seen = layer
    packed = int8.Method().compress(weight, seen, int8.Config())
    codes = packed.tensors()["weight"]
    assert codes.dtype == torch.int8
    assert int(codes.abs().amax()) <= 127
    assert bool((codes.abs().amax(1) >= 126).all()), "the largest weight of a row has the largest code"
    assert bool(((packed.dequantize() - weight).abs() <= 0.51 * weight.abs().amax(1, keepdim=True) / 126).all())


@pytest.mark.parametrize("calibrator", FIXED)
def test_the_scale_of_the_inputs_is_the_calibrators(calibrator: str, layer: tuple[Tensor, Statistics]) -> None:
    weight, seen = layer
    rows = seen.rows("int8", 64)
    stored = int8.Method().compress(weight, seen, int8.Config.model_validate({"calibrator": calibrator})).tensors()
    wanted = {
        "max": range_calibrators.highest(rows),
        "entropy": range_calibrators.entropy(rows),
        "mse": range_calibrators.least_squares(rows),
    }
    top = wanted.get(calibrator) or range_calibrators.percentile(rows, float(calibrator[1:]))
    assert top <= float(stored["input_scale"]) * 127 < 1.016 * top, "rounded up to bfloat16"


def test_a_lone_outlier_ruins_the_largest_value_and_not_the_others(layer: tuple[Tensor, Statistics]) -> None:
    weight, seen = layer
    rows = seen.rows("int8", 64)[10:]
    exact = rows @ weight.T

    def error(calibrator: str) -> float:
        packed = int8.Method().compress(weight, seen, int8.Config.model_validate({"calibrator": calibrator}))
        return float((packed.forward(rows) - exact).square().mean())

    assert error("p99.9") < 0.1 * error("max")
    assert error("entropy") < error("max")


def test_best_asks_for_every_calibrator_and_is_refused_on_one_layer(layer: tuple[Tensor, Statistics]) -> None:
    best = int8.Config(calibrator="best")
    assert [config.calibrator for config in int8.Method().candidates(best)] == FIXED
    assert int8.Method().candidates(int8.Config(calibrator="max")) == [int8.Config(calibrator="max")]
    with pytest.raises(ValueError, match="whole model"):
        int8.Method().compress(*layer, best)


def test_a_sample_of_inputs_is_needed(layer: tuple[Tensor, Statistics]) -> None:
    weight, seen = layer
    with pytest.raises(ValueError, match=r"int8 needs calibration: statistics\.inputs_NI"):
        int8.Method().compress(weight, Statistics(seen.hessian_II, 500), int8.Config())
    with pytest.raises(ValueError, match="3 features; the layer has 64"):
        int8.Method().compress(weight, Statistics(seen.hessian_II, 500, inputs_NI=torch.ones(2, 3)), int8.Config())
