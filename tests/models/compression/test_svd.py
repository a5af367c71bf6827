"""Low rank: the optimum of each metric, storage, and the cheaper product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.compression import svd
from models.compression.base import Statistics, relative_error
from models.compression.solvers import obs


def test_the_plain_error_is_the_sum_of_the_singular_values_left_out(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=24, columns=40)
    packed = svd.Method().compress(weight, seen, svd.Config(rank=9, metric="weight", value_bits=32))
    values = torch.linalg.svdvals(weight.double())
    assert relative_error(weight, packed.dequantize()) == pytest.approx(
        float(values[9:].square().sum() / values.square().sum()), rel=1e-4
    )


def test_no_step_away_from_the_whitened_solution_lowers_the_output_error(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=12, columns=24)
    config = svd.Config(rank=5, value_bits=32, damp=1e-9)
    packed = svd.Method().compress(weight, seen, config)
    assert isinstance(packed, svd.LowRankPacked)
    best = relative_error(weight, packed.dequantize(), seen.hessian_II)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            left = packed.left_OR + size * torch.randn(packed.left_OR.shape, generator=generator)
            right = packed.right_RI + size * torch.randn(packed.right_RI.shape, generator=generator)
            assert relative_error(weight, left @ right, seen.hessian_II) > best


def test_the_whitened_error_is_the_tail_of_the_whitened_weight(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=16, columns=24)
    packed = svd.Method().compress(weight, seen, svd.Config(rank=6, value_bits=32))
    damped = obs.damped(seen.hessian_II, seen.tokens, 0.01)
    values = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(damped))
    expected = float(values[6:].square().sum() / values.square().sum())
    assert relative_error(weight, packed.dequantize(), damped) == pytest.approx(expected, rel=1e-3)


def test_the_more_a_metric_knows_the_smaller_the_output_error(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=48, columns=64, tokens=900)
    errors = [
        relative_error(
            weight, svd.Method().compress(weight, seen, svd.Config(metric=metric)).dequantize(), seen.hessian_II
        )
        for metric in ("hessian", "diagonal", "weight")
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[2]


@pytest.mark.parametrize("metric", ["hessian", "diagonal", "weight"])
def test_a_random_projection_of_the_same_rank_is_far_worse(metric: Any, layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=48, columns=64, tokens=900)
    config = svd.Config(metric=metric)
    mine, arms = svd.Method().compress(weight, seen, config), svd.Method().baselines(weight, seen, config)
    assert set(arms) == ({"random"} if metric == "weight" else {"random", "plain"})
    error = relative_error(weight, mine.dequantize(), seen.hessian_II)
    assert all(arm.stored_bits() == mine.stored_bits() for arm in arms.values())
    assert error < 0.5 * relative_error(weight, arms["random"].dequantize(), seen.hessian_II)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 13), (0.25, 6), (0.001, 1), (1.0, 26)])
def test_the_rank_is_the_largest_within_the_share(share: float, expected: int) -> None:
    weight = torch.randn(40, 80)
    assert svd.rank_of(weight, svd.Config(share=share)) == expected
    packed = svd.Method().compress(weight, Statistics(), svd.Config(share=share, metric="weight"))
    assert packed.stored_bits() == 16 * expected * 120


def test_full_rank_is_the_weight(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=16, columns=24)
    dense = svd.Method().compress(weight, seen, svd.Config(rank=16, value_bits=32)).dequantize()
    assert torch.allclose(dense, weight, atol=1e-5)


def test_the_two_thin_products_are_the_layer(layer: Callable[..., Any]) -> None:
    weight, inputs, seen = layer()
    packed = svd.Method().compress(weight, seen, svd.Config(value_bits=32))
    assert torch.allclose(packed.forward(inputs), inputs @ packed.dequantize().T, atol=1e-4)
    assert packed.forward(inputs.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({}, "50-bf16"),
        ({"rank": 32, "value_bits": 32, "metric": "weight"}, "r32-fp32-weight"),
        ({"share": 0.125}, "12p5-bf16"),
    ],
)
def test_labels_name_size_and_metric(values: dict[str, Any], label: str) -> None:
    assert svd.Config(**values).label == label


def test_calibration_is_required_by_the_metrics_that_use_it() -> None:
    weight = torch.randn(4, 8)
    for metric in ("hessian", "diagonal"):
        with pytest.raises(ValueError, match="svd needs calibration"):
            svd.Method().compress(weight, Statistics(), svd.Config(metric=metric))
    assert svd.Method().compress(weight, Statistics(), svd.Config(metric="weight")).dequantize().shape == weight.shape
