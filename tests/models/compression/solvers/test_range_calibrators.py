"""Calibrators against what their names promise, on values whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.compression.solvers import range_calibrators


@pytest.fixture(scope="module")
def bell() -> Tensor:
    """Normal values, and one of a thousand of them ten times as large."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, 500, generator=generator)
    return torch.where(torch.rand(200, 500, generator=generator) < 1e-3, values * 10, values)


def rounding_error(values: Tensor, top: float) -> float:
    """Return the mean squared error of 255 levels up to `top`."""
    scale = top / 127
    return float(((values / scale).round().clamp(-127, 127) * scale - values).square().mean())


def test_highest_is_the_largest_magnitude() -> None:
    assert range_calibrators.highest(torch.tensor([[1.0, -3.0], [2.0, 0.0]])) == 3.0


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9, 99.99])
def test_a_percentile_leaves_so_many_above(percent: float, bell: Tensor) -> None:
    top = range_calibrators.percentile(bell, percent)
    assert float((bell.abs() > top).double().mean()) == pytest.approx(1 - percent / 100, abs=2e-5)
    assert top == pytest.approx(float(np.percentile(bell.abs().numpy(), percent)), rel=1e-2)


def test_a_percentile_of_few_values_is_their_largest() -> None:
    assert range_calibrators.percentile(torch.tensor([1.0, -2.0]), 99.99) == 2.0


def test_least_squares_is_near_the_best_of_a_fine_search(bell: Tensor) -> None:
    mine = rounding_error(bell, range_calibrators.least_squares(bell))
    best = min(rounding_error(bell, top) for top in np.linspace(0.5, range_calibrators.highest(bell), 400))
    assert mine < 1.03 * best
    assert mine < 0.9 * rounding_error(bell, range_calibrators.highest(bell)), (
        "clipping must pay here, or nothing is shown"
    )


def test_entropy_clips_a_long_tail_and_keeps_a_flat_distribution(bell: Tensor) -> None:
    assert 2.0 < range_calibrators.entropy(bell) < 0.7 * range_calibrators.highest(bell)
    flat = torch.linspace(-1, 1, 50_000)
    assert range_calibrators.entropy(flat) > 0.9


def test_divergence_is_that_of_a_slow_obvious_one(bell: Tensor) -> None:
    """Levels and bins in plain loops, for one width."""
    counts, _ = range_calibrators.histogram(bell)
    width = 512
    clipped = counts[:width].tolist()
    clipped[-1] += float(counts[width:].sum())
    spread = [0.0] * width
    for level in range(128):
        bins = [b for b in range(width) if b * 128 // width == level]
        filled = [b for b in bins if counts[b] > 0]
        for b in filled:
            spread[b] = sum(float(counts[i]) for i in bins) / len(filled)
    p, q = np.array(clipped) / sum(clipped), np.array(spread) / sum(spread)
    slow = float((p[p > 0] * np.log(p[p > 0] / np.maximum(q[p > 0], 1e-12))).sum())
    assert float(range_calibrators._divergence(counts, width)) == pytest.approx(slow, rel=1e-9)


def test_a_histogram_counts_everything_and_ends_at_the_largest(bell: Tensor) -> None:
    counts, centres = range_calibrators.histogram(bell)
    assert float(counts.sum()) == bell.numel()
    assert counts[-1] >= 1
    assert float(centres[-1]) == pytest.approx(range_calibrators.highest(bell), rel=1e-3)


def test_inputs_that_are_all_zero_have_a_histogram() -> None:
    assert float(range_calibrators.histogram(torch.zeros(4, 4))[0][0]) == 16
