"""PB-LLM: mixed storage counted bit by bit, compensation as in a slow GPTQ, and its choice against chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.compression import pb_llm
from models.compression.base import Statistics, relative_error
from models.compression.solvers import obs


def reference(weight_OI: Tensor, seen: Statistics, config: pb_llm.Config) -> Tensor:
    """Row by row and column by column, inverting the Hessian of the free columns anew at every step."""
    assert seen.hessian_II is not None
    hessian = obs.damped(seen.hessian_II, seen.tokens, config.damp)
    salient = pb_llm.highest(pb_llm.score(weight_OI, hessian, config.salience), config.salient)
    levels = pb_llm.fit(weight_OI, salient, config)
    size = weight_OI.shape[1] // levels.scale_OG.shape[1]
    stored = torch.zeros_like(weight_OI, dtype=torch.float64)
    for row in range(len(weight_OI)):
        weight = weight_OI[row].double().clone()
        for column in range(len(weight)):
            scale, mean, amplitude = (float(values[row, column // size]) for values in levels)
            if salient[row, column]:
                stored[row, column] = max(-127, min(127, round(float(weight[column]) / scale))) * scale
            else:
                stored[row, column] = mean + amplitude * (1 if weight[column] >= mean else -1)
            inverse = hessian[column:, column:].inverse()
            weight[column:] -= (weight[column] - stored[row, column]) / inverse[0, 0] * inverse[0]
    return stored


@pytest.mark.parametrize("salience", ["magnitude", "hessian"])
@pytest.mark.parametrize("group_size", [0, 8])
def test_it_is_gptq_with_the_mixed_quantizer(salience: Any, group_size: int, layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=5, columns=32)
    config = pb_llm.Config(salience=salience, group_size=group_size)
    found = pb_llm.Method().compress(weight, seen, config).dequantize().double()
    assert torch.allclose(found, reference(weight, seen, config), atol=1e-5)


@pytest.mark.parametrize("salience", ["magnitude", "hessian"])
def test_its_choice_and_its_compensation_beat_chance_and_rounding(salience: Any, layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=48, columns=96, tokens=900)
    config = pb_llm.Config(salience=salience)
    mine, arms = pb_llm.Method().compress(weight, seen, config), pb_llm.Method().baselines(weight, seen, config)
    assert set(arms) == {"random", "rtn"}
    error = relative_error(weight, mine.dequantize(), seen.hessian_II)
    for arm in arms.values():
        assert arm.stored_bits() == mine.stored_bits()
        assert error < 0.8 * relative_error(weight, arm.dequantize(), seen.hessian_II)


def test_more_salient_weights_cost_bits_and_buy_accuracy(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=48, columns=96, tokens=900)
    packed = [
        pb_llm.Method().compress(weight, seen, pb_llm.Config(salient=share)) for share in (0.0, 0.05, 0.1, 0.3, 0.6)
    ]
    errors = [relative_error(weight, p.dequantize(), seen.hessian_II) for p in packed]
    bits = [p.stored_bits() for p in packed]
    assert errors == sorted(errors, reverse=True)
    assert bits == sorted(bits)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("group_size", [0, 32])
def test_bits_are_codes_signs_bitmap_and_three_numbers_a_group(
    share: float, group_size: int, layer: Callable[..., Any]
) -> None:
    weight, _, seen = layer(rows=40, columns=64)
    packed = pb_llm.Method().compress(weight, seen, pb_llm.Config(salient=share, group_size=group_size))
    salient, groups = round(share * 40 * 64), 64 // group_size if group_size else 1
    signs = -(-(40 * 64 - salient) // 8) * 8
    assert packed.stored_bits() == 8 * salient + signs + 40 * 64 + 3 * 16 * 40 * groups + 2 * 64


def test_weights_come_back_bit_for_bit(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=7, columns=24)
    config = pb_llm.Config(group_size=8, salient=0.2)
    packed = pb_llm.Method().compress(weight, seen, config)
    again = pb_llm.Method().restore(packed.tensors(), config)
    assert torch.equal(again.dequantize(), packed.dequantize())
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in packed.tensors().items())


def test_the_largest_weights_of_the_layer_are_salient(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer()
    mask = pb_llm.highest(weight.abs(), 0.1)
    assert int(mask.sum()) == round(0.1 * weight.numel())
    assert weight[mask].abs().min() >= weight[~mask].abs().max()


def test_hessian_salience_is_the_cost_of_removing_a_weight(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=2, columns=6)
    hessian = obs.damped(seen.hessian_II, seen.tokens, 0.01)
    found = pb_llm.score(weight, hessian, "hessian")
    for column in range(6):
        rest = hessian[column:, column:].inverse()
        expected = weight[:, column].double().square() / rest[0, 0]
        assert torch.allclose(found[:, column], expected)


def test_others_of_a_row_take_two_values_for_each_group(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=6)
    config = pb_llm.Config(group_size=16, salience="magnitude")
    dense = pb_llm.Method().compress(weight, seen, config).dequantize()
    others = ~pb_llm.highest(weight.abs(), config.salient)
    for row in range(6):
        for start in range(0, 64, 16):
            span = slice(start, start + 16)
            assert len(set(dense[row, span][others[row, span]].tolist())) <= 2


def test_the_gain_holds_on_inputs_it_never_saw(layer: Callable[..., Any]) -> None:
    weight, inputs, _ = layer(rows=48, columns=64, tokens=2000)
    shown, held = inputs[:1000].double(), inputs[1000:].double()
    seen, config = Statistics(shown.T @ shown, 1000), pb_llm.Config()
    mine, arms = pb_llm.Method().compress(weight, seen, config), pb_llm.Method().baselines(weight, seen, config)
    error = relative_error(weight, mine.dequantize(), held.T @ held)
    assert all(error < 0.85 * relative_error(weight, arm.dequantize(), held.T @ held) for arm in arms.values())


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_an_amplitude_over_whole_rows_would_lose_more(share: float, layer: Callable[..., Any]) -> None:
    """The released code divides by the whole row, salient weights counted as zeros."""
    weight, _, _ = layer(rows=48)
    salient = pb_llm.highest(weight.abs(), share)
    levels = pb_llm.fit(weight, salient, pb_llm.Config(salient=share))
    mean, others = levels.mean_OG, ~salient
    released = ((weight - mean).abs() * others).mean(1, keepdim=True)
    errors = [
        float((((weight - mean).abs() - amplitude) * others).square().sum())
        for amplitude in (levels.amplitude_OG, released)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({}, "10"),
        ({"salient": 0.3, "salience": "hessian", "group_size": 128}, "30-hessian-g128"),
        ({"salient": 0.125}, "12p5"),
    ],
)
def test_labels_name_share_and_salience(values: dict[str, Any], label: str) -> None:
    assert pb_llm.Config(**values).label == label


def test_calibration_is_required() -> None:
    with pytest.raises(ValueError, match="pb_llm needs calibration"):
        pb_llm.Method().compress(torch.randn(2, 4), Statistics(), pb_llm.Config())
