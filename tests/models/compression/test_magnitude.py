"""Magnitude pruning against its definition, and against masks that know nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.compression import magnitude
from models.compression.base import Statistics, relative_error

EXACT = {"value_bits": 32, "storage": "bitmask"}


def test_the_smallest_of_each_row_are_gone_and_the_rest_is_untouched(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer()
    dense = magnitude.Method().compress(weight, Statistics(), magnitude.Config(sparsity=0.25, **EXACT)).dequantize()
    for row in range(len(weight)):
        gone = weight[row][dense[row] == 0].abs()
        left = weight[row][dense[row] != 0].abs()
        assert len(gone) == 16
        assert gone.max() < left.min()
    assert bool(((dense == 0) | (dense == weight)).all())


def test_no_mask_of_the_same_pattern_is_closer_to_the_weight() -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    mine = magnitude.Method().compress(weight, Statistics(), magnitude.Config(pattern="2:4", **EXACT)).dequantize()
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    for row in range(3):
        kept = max(float(weight[row, list(pair)].square().sum()) for pair in pairs)
        assert float(mine[row].square().sum()) == pytest.approx(kept)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_a_random_mask_of_the_same_bytes_loses_more(pattern: Any, layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    config = magnitude.Config(pattern=pattern)
    mine, (arm,) = (
        magnitude.Method().compress(weight, seen, config),
        magnitude.Method().baselines(weight, seen, config).values(),
    )
    assert mine.stored_bits() == arm.stored_bits()
    assert relative_error(weight, mine.dequantize()) < 0.5 * relative_error(weight, arm.dequantize())


def test_calibration_changes_nothing(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    one, two = (magnitude.Method().compress(weight, s, magnitude.Config()).dequantize() for s in (seen, Statistics()))
    assert torch.equal(one, two)
