"""BiLLM: searches against trying everything, the exact correction against least squares, every ablation hurts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.compression import billm
from models.compression.base import Statistics, relative_error
from models.compression.solvers import obs


def binarized(values: Tensor) -> Tensor:
    """Return mean +- amplitude of a list of numbers, rounded as they are stored."""
    mean = values.mean().bfloat16().float()
    amplitude = (values - mean).abs().mean().bfloat16().float()
    return torch.where(values >= mean, mean + amplitude, mean - amplitude)


def slow_block(weight: Tensor, salient: list[int], threshold: float) -> Tensor:
    """Return the stored block, row by row, from the definition."""
    dense = torch.zeros_like(weight)
    others = [i for i in range(weight.shape[1]) if i not in salient]
    for row in range(len(weight)):
        if salient:
            first = binarized(weight[row, salient])
            dense[row, salient] = first + binarized(weight[row, salient] - first)
        for large in (True, False):
            group = [i for i in others if (abs(float(weight[row, i])) >= threshold) is large]
            if group:
                dense[row, group] = binarized(weight[row, group])
    return dense


def test_a_block_is_what_the_paper_describes(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(rows=6, columns=24)
    salient = torch.zeros(24, dtype=torch.bool)
    salient[[2, 11, 17]] = True
    marks = billm.split_by_size(weight, ~salient)
    threshold = float(weight[marks].abs().min())
    found = billm.binarize(weight, salient, marks).dense()
    assert torch.allclose(found, slow_block(weight, [2, 11, 17], threshold), atol=1e-6)


def test_the_threshold_is_the_best_of_the_percentiles(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(rows=6, columns=32)
    none = torch.zeros(32, dtype=torch.bool)
    best = (billm.binarize(weight, none, billm.split_by_size(weight, ~none)).dense() - weight).square().sum()
    for percentile in torch.arange(0.10, 0.901, 0.01):
        marks = weight.abs() >= weight.abs().flatten().quantile(float(percentile), interpolation="nearest")
        assert best <= (billm.binarize(weight, none, marks).dense() - weight).square().sum() * (1 + 1e-6)


def test_the_number_of_salient_columns_is_the_best_of_all_tried(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(rows=12, columns=40)
    weight[:, [3, 8, 21]] *= 6
    order = weight.square().sum(0).argsort(descending=True)
    found = billm.salient_columns(weight, order, 20)

    def error(count: int) -> float:
        chosen = order[:count].tolist()
        dense = slow_block(weight, chosen, threshold=0.0)
        return float((dense - weight).square().sum())

    best = min(range(1, 21), key=error)
    assert set(found.nonzero().flatten().tolist()) == set(order[:best].tolist())
    assert {3, 8, 21} <= set(order[:best].tolist())


def test_the_exact_correction_is_the_least_squares_of_the_columns_to_come(layer: Callable[..., Any]) -> None:
    _, _, seen = layer(rows=4, columns=24)
    hessian = obs.damped(seen.hessian_II, seen.tokens, 0.01)
    factor = obs.inverse_factor(hessian)
    error = 0.1 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = -billm.correction(error, factor[:8, :8], "exact") @ factor[:8, 8:]
    # minimise d H d^T over the free part of d, the stored part being -error
    expected = error @ hessian[:8, 8:] @ hessian[8:, 8:].inverse()
    assert torch.allclose(found, expected)


def test_the_released_correction_is_exact_only_for_one_column(layer: Callable[..., Any]) -> None:
    _, _, seen = layer(columns=24)
    factor = obs.inverse_factor(obs.damped(seen.hessian_II, seen.tokens, 0.01))
    error = torch.ones(4, 8, dtype=torch.float64)
    one = [billm.correction(error[:, :1], factor[:1, :1], kind) for kind in ("exact", "elementwise")]
    many = [billm.correction(error, factor[:8, :8], kind) for kind in ("exact", "elementwise")]
    assert torch.allclose(one[0], one[1])
    assert not torch.allclose(many[0], many[1], rtol=0.1)


def test_the_exact_correction_leaves_less_error_than_the_released_one(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=48, columns=128, tokens=900)
    errors = [
        relative_error(
            weight,
            billm.Method().compress(weight, seen, billm.Config(block=16, correction=kind)).dequantize(),
            seen.hessian_II,
        )
        for kind in ("exact", "elementwise")
    ]
    assert errors[0] < errors[1]


def test_every_ablation_hurts_at_the_same_bytes(layer: Callable[..., Any]) -> None:
    """With few salient columns; the search itself takes nearly all 32 of a block, and then it matters little which."""
    weight, _, seen = layer(rows=48, columns=128, tokens=900)
    config = billm.Config(block=32, most_salient=6)
    mine, arms = billm.Method().compress(weight, seen, config), billm.Method().baselines(weight, seen, config)
    assert set(arms) == {"random_columns", "no_residual", "no_split", "uncompensated"}
    error = relative_error(weight, mine.dequantize(), seen.hessian_II)
    for name, arm in arms.items():
        assert arm.stored_bits() == mine.stored_bits(), name
        assert error < 0.97 * relative_error(weight, arm.dequantize(), seen.hessian_II), name


def test_one_block_has_nothing_to_compensate(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    assert "uncompensated" not in billm.Method().baselines(weight, seen, billm.Config(block=64))


@pytest.mark.parametrize("block", [16, 24, 64, 128])
def test_every_stored_bit_is_counted(block: int, layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=40, columns=64)
    packed = billm.Method().compress(weight, seen, billm.Config(block=block))
    assert isinstance(packed, billm.BlocksPacked)
    salient = sum(int(part.salient_B.sum()) for part in packed.blocks)
    planes = 40 * 64 + 40 * salient + 40 * (64 - salient)
    assert packed.stored_bits() == planes + 64 + 8 * 16 * 40 * -(-64 // block) + 2 * 64


def test_at_the_block_of_the_paper_about_three_bits_a_weight_are_stored(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=64, columns=256)
    packed = billm.Method().compress(weight, seen, billm.Config())
    assert packed.stored_bits() / weight.numel() == pytest.approx(3.0, abs=0.03)


@pytest.mark.parametrize("block", [24, 33, 128])
def test_weights_come_back_bit_for_bit(block: int, layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=7, columns=67)
    config = billm.Config(block=block)
    packed = billm.Method().compress(weight, seen, config)
    again = billm.Method().restore(packed.tensors(), config)
    assert torch.equal(again.dequantize(), packed.dequantize())
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in packed.tensors().items())


def test_labels_name_block_and_correction() -> None:
    assert billm.Config().label == "b128"
    assert billm.Config(block=32, correction="elementwise").label == "b32-elementwise"


def test_calibration_is_required() -> None:
    with pytest.raises(ValueError, match="billm needs calibration"):
        billm.Method().compress(torch.randn(2, 16), Statistics(), billm.Config())
