"""Wanda against its definition, its null arms and its storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.compression import wanda
from models.compression.base import Statistics, relative_error

EXACT = {"value_bits": 32, "storage": "bitmask"}


def test_the_score_is_weight_times_input_norm(layer: Callable[..., Any]) -> None:
    weight, inputs, seen = layer(rows=3, columns=8)
    scores = wanda.scores(weight, seen.hessian_II)
    for row in range(3):
        for column in range(8):
            norm = float(inputs[:, column].double().norm())
            assert float(scores[row, column]) == pytest.approx(abs(float(weight[row, column])) * norm, rel=1e-9)


def test_survivors_are_the_original_weights(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    dense = wanda.Method().compress(weight, seen, wanda.Config(**EXACT)).dequantize()
    assert bool(((dense == 0) | (dense == weight)).all())
    assert bool(((dense == 0).sum(1) == 32).all())


@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
@pytest.mark.parametrize("storage", [EXACT, {}])
def test_a_pattern_holds_in_every_run(
    pattern: Any, kept: int, of: int, storage: dict[str, Any], layer: Callable[..., Any]
) -> None:
    weight, _, seen = layer()
    dense = wanda.Method().compress(weight, seen, wanda.Config(pattern=pattern, **storage)).dequantize()
    assert bool(((dense != 0).reshape(-1, of).sum(1) <= kept).all())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("storage", [EXACT, {}, {"value_bits": 8, "storage": "bitmask"}])
def test_outputs_are_closer_than_those_of_magnitude_and_random_masks(
    pattern: Any, storage: dict[str, Any], layer: Callable[..., Any]
) -> None:
    weight, _, seen = layer(rows=64)
    config = wanda.Config(pattern=pattern, **storage)
    mine, arms = wanda.Method().compress(weight, seen, config), wanda.Method().baselines(weight, seen, config)
    assert {p.stored_bits() for p in arms.values()} == {mine.stored_bits()}
    errors = {name: relative_error(weight, p.dequantize(), seen.hessian_II) for name, p in arms.items()}
    mine_error = relative_error(weight, mine.dequantize(), seen.hessian_II)
    assert mine_error < 0.9 * errors["magnitude"] < errors["random"]


def test_even_inputs_make_it_magnitude_pruning(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer()
    seen = Statistics(torch.eye(64) * 7, 100)
    config = wanda.Config(**EXACT)
    magnitude = wanda.Method().baselines(weight, seen, config)["magnitude"].dequantize()
    assert torch.equal(wanda.Method().compress(weight, seen, config).dequantize(), magnitude)


@pytest.mark.parametrize(("bits", "expected"), [(32, 1 + 16), (16, 1 + 8)])
def test_a_bitmask_saves_the_bytes_of_the_zeros(bits: Any, expected: float, layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=128, columns=128)
    packed = wanda.Method().compress(weight, seen, wanda.Config(value_bits=bits, storage="bitmask"))
    assert packed.stored_bits() == expected * weight.numel() + 128


def test_a_bitmask_of_int8_stores_about_five_bits(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=128, columns=128)
    packed = wanda.Method().compress(weight, seen, wanda.Config(value_bits=8, storage="bitmask"))
    assert packed.stored_bits() == 5 * weight.numel() + 16 * 128 + 128


def test_the_same_codes_in_either_storage_stand_for_the_same_weight(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    both = [wanda.Method().compress(weight, seen, wanda.Config(storage=s)).dequantize() for s in ("packed", "bitmask")]
    assert torch.equal(both[0], both[1])


def test_calibration_is_required() -> None:
    with pytest.raises(ValueError, match="wanda needs calibration"):
        wanda.Method().compress(torch.randn(2, 4), Statistics(), wanda.Config())
