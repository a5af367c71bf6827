"""GPFQ: its definition written out, the theorem on how its error decays, and its variants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from models.compression import gpfq
from models.compression.base import Statistics, relative_error


@pytest.fixture
def seen(layer: Callable[..., Any]) -> Callable[..., tuple[Tensor, Statistics]]:
    """Return a factory of (weight, statistics with inputs that differ a little from the original model's)."""

    def build(**sizes: Any) -> tuple[Tensor, Statistics]:
        weight, inputs, statistics = layer(**sizes)
        noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(5))
        return weight, replace(statistics, inputs_NI=inputs, reference_NI=inputs + 0.02 * noise)

    return build


def slow(weight: Tensor, reference: Tensor, inputs: Tensor, levels: list[list[float]]) -> Tensor:
    """One row and one weight at a time: the level that leaves the smallest error vector, found by trying them all."""
    stored = torch.zeros_like(weight, dtype=torch.float64)
    for row in range(len(weight)):
        error = torch.zeros(len(inputs), dtype=torch.float64)
        for t in range(weight.shape[1]):
            error += float(weight[row, t]) * reference[:, t].double()
            tried = [float((error - level * inputs[:, t].double()).norm()) for level in levels[row]]
            stored[row, t] = levels[row][tried.index(min(tried))]
            error -= stored[row, t] * inputs[:, t].double()
    return stored


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_weight_leaves_the_smallest_error_that_any_level_could(bits: int, seen: Callable[..., Any]) -> None:
    weight, statistics = seen(rows=4, columns=24, tokens=40)
    config = gpfq.Config(bits=bits)
    most = 2 ** (bits - 1) - 1
    levels = [[code * float(s) for code in range(-most, most + 1)] for s in gpfq.steps(weight, config)]
    found = gpfq.Method().compress(weight, statistics, config).dequantize().double()
    assert torch.allclose(found, slow(weight, statistics.reference_NI, statistics.inputs_NI, levels), atol=1e-6)


def slope(sizes: list[int], errors: list[float]) -> float:
    """Return the least-squares slope of log error over log size."""
    x, y = (torch.tensor([math.log(v) for v in values]) for values in (sizes, errors))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def test_the_error_decays_with_the_width_as_the_theorem_says_and_that_of_rounding_does_not() -> None:
    """Gaussian inputs, 64 tokens, uniform weights, ternary alphabet {-1, 0, 1}: slope near -1 against 0."""
    sizes, mine, naive = [128, 256, 512, 1024, 2048, 4096], list[float](), list[float]()
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        inputs = torch.randn(64, size, generator=generator)
        weight = torch.rand(16, size, generator=generator) * 2 - 1
        moment = inputs.double().T @ inputs.double()
        stored = gpfq.greedy(weight, inputs, inputs, lambda _, wanted: wanted.round().clamp(-1, 1))
        mine.append(relative_error(weight, stored, moment))
        naive.append(relative_error(weight, weight.round(), moment))
    assert -1.2 < slope(sizes, mine) < -0.8
    assert abs(slope(sizes, naive)) < 0.1
    assert mine[-1] < 0.01 < 0.2 < naive[-1]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("step", ["row", "layer"])
def test_outputs_are_closer_than_those_of_rounding_on_the_same_alphabet(
    bits: int, step: Any, seen: Callable[..., Any]
) -> None:
    weight, statistics = seen(rows=48, columns=96, tokens=600)
    config = gpfq.Config(bits=bits, step=step)
    mine, (naive,) = (
        gpfq.Method().compress(weight, statistics, config),
        gpfq.Method().baselines(weight, statistics, config).values(),
    )
    assert mine.stored_bits() == naive.stored_bits()
    error, base = (relative_error(weight, p.dequantize(), statistics.hessian_II) for p in (mine, naive))
    assert error < 0.9 * base


def test_it_aims_at_the_outputs_of_the_original_model(layer: Callable[..., Any]) -> None:
    weight, inputs, statistics = layer(rows=24, columns=64, tokens=300)
    drifted = inputs * 1.1
    informed = gpfq.Method().compress(
        weight, replace(statistics, inputs_NI=drifted, reference_NI=inputs), gpfq.Config()
    )
    blind = gpfq.Method().compress(weight, replace(statistics, inputs_NI=drifted, reference_NI=drifted), gpfq.Config())
    wanted = inputs @ weight.T
    errors = [float((drifted @ p.dequantize().T - wanted).norm()) for p in (informed, blind)]
    assert errors[0] < 0.7 * errors[1]


def test_the_step_of_a_row_is_the_best_of_those_tried(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(rows=6)
    found = gpfq.steps(weight, gpfq.Config(bits=3))
    for row in range(6):

        def error(scale: float, row: int = row) -> float:
            return float(((weight[row] / scale).round().clamp(-3, 3) * scale - weight[row]).square().sum())

        largest = float(weight[row].abs().max())
        assert all(error(float(found[row])) <= error(largest * share / 100 / 3) * 1.03 for share in range(25, 101))


def test_one_step_for_the_layer_is_the_mean_quantile(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer()
    found = gpfq.steps(weight, gpfq.Config(bits=3, step="layer", percentile=0.9, radius=1.5))
    assert len(set(found.tolist())) == 1
    expected = torch.stack([row.abs().quantile(0.9) for row in weight]).mean() * 1.5 / 3
    assert float(found[0]) == pytest.approx(float(expected), rel=2**-8)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [("none", [0, 1, 1, 2, -2, 3, -3]), ("soft", [0, 0, 1, 1, -2, 3, -3]), ("hard", [0, 0, 1, 2, -2, 3, -3])],
)
def test_thresholds_zero_what_is_small_and_only_the_soft_one_shrinks_the_rest(
    threshold: Any, expected: list[int]
) -> None:
    wanted = torch.tensor([0.2, 0.6, 1.4, 2.1, -2.4, 9.0, -9.0]) * 0.5
    config = gpfq.Config(bits=3, threshold=threshold, level=0.0 if threshold == "none" else 0.75)
    found = gpfq.nearest_level(wanted, torch.full((7,), 0.5), config, torch.Generator())
    assert (found / 0.5).tolist() == expected


def test_thresholds_leave_more_zeros(seen: Callable[..., Any]) -> None:
    weight, statistics = seen()
    zeros = [
        float((gpfq.Method().compress(weight, statistics, config).dequantize() == 0).float().mean())
        for config in (gpfq.Config(), gpfq.Config(threshold="hard", level=1.5), gpfq.Config(threshold="soft", level=2))
    ]
    assert zeros[0] + 0.05 < min(zeros[1:])


def test_stochastic_rounding_is_right_on_average_and_repeats_by_seed() -> None:
    config = gpfq.Config(bits=4, rounding="stochastic")
    wanted, scale = torch.full((20000,), 0.3), torch.ones(20000)
    draws = [gpfq.nearest_level(wanted, scale, config, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert set(draws[0].tolist()) == {0.0, 1.0}
    assert float(draws[0].mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_seeds_change_only_the_stochastic_variant(seen: Callable[..., Any]) -> None:
    weight, statistics = seen()
    for rounding, same in (("nearest", True), ("stochastic", False)):
        one, two = (
            gpfq.Method().compress(weight, statistics, gpfq.Config(rounding=rounding, rounding_seed=seed)).dequantize()
            for seed in (0, 1)
        )
        assert torch.equal(one, two) is same


def test_an_input_that_is_always_zero_is_rounded_alone(seen: Callable[..., Any]) -> None:
    weight, statistics = seen()
    statistics.inputs_NI[:, 3] = 0.0
    config = gpfq.Config()
    stored = gpfq.Method().compress(weight, statistics, config).dequantize()[:, 3]
    assert torch.equal(stored, gpfq.Method().baselines(weight, statistics, config)["rtn"].dequantize()[:, 3])


def test_two_bits_are_ternary(seen: Callable[..., Any]) -> None:
    weight, statistics = seen()
    dense = gpfq.Method().compress(weight, statistics, gpfq.Config(bits=2)).dequantize()
    assert max(len(set(row.tolist())) for row in dense) <= 3


@pytest.mark.parametrize("missing", ["inputs_NI", "reference_NI"])
def test_recorded_inputs_are_required(missing: str, seen: Callable[..., Any]) -> None:
    weight, statistics = seen()
    with pytest.raises(ValueError, match=f"gpfq needs calibration: statistics.{missing} is None"):
        gpfq.Method().compress(weight, replace(statistics, **{missing: None}), gpfq.Config())


def test_inputs_of_another_layer_are_refused(seen: Callable[..., Any]) -> None:
    _, statistics = seen()
    with pytest.raises(ValueError, match=r"inputs_NI has shape \(400, 64\); the layer has 8 input features"):
        gpfq.Method().compress(torch.randn(2, 8), statistics, gpfq.Config())


@pytest.mark.parametrize("values", [{"threshold": "soft"}, {"level": 0.5}])
def test_a_threshold_needs_its_level(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="contradict each other"):
        gpfq.Config(**values)


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({}, "int4-channel"),
        ({"bits": 3, "threshold": "soft", "level": 0.5}, "int3-channel-soft0p5"),
        ({"rounding": "stochastic"}, "int4-channel-stochastic"),
    ],
)
def test_labels_name_bits_and_variant(values: dict[str, Any], label: str) -> None:
    assert gpfq.Config(**values).label == label
