"""AWQ: its loss is the error of the outputs, its search cannot lose, and large activations get finer weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.compression import awq, rtn
from models.compression.base import Statistics, relative_error
from models.compression.formats import int_grid


def test_the_loss_is_the_error_of_the_outputs(layer: Callable[..., Any]) -> None:
    weight, inputs, seen = layer()
    error = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    direct = float((inputs.double() @ error.double().T).square().sum())
    assert awq.output_loss(error, seen.hessian_II) == pytest.approx(direct, rel=1e-6)


def test_the_loss_of_a_group_is_the_error_of_its_part_of_the_outputs(layer: Callable[..., Any]) -> None:
    weight, inputs, seen = layer(rows=3, columns=32)
    error = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    found = awq.group_loss(seen.hessian_II, weight, awq.Config(group_size=8))(error.unflatten(1, (4, 8)))
    for row in range(3):
        for group in range(4):
            span = slice(8 * group, 8 * group + 8)
            assert float(found[row, group]) == pytest.approx(float((inputs[:, span] @ error[row, span]).square().sum()))


@pytest.mark.parametrize("table", [{}, {"bits": 3, "group_size": 0}, {"symmetric": False}, {"clip": "max", "bits": 3}])
@pytest.mark.parametrize("input_scales", [True, False])
def test_outputs_are_closer_than_those_of_rounding_in_the_same_storage(
    table: dict[str, Any], input_scales: bool, layer: Callable[..., Any]
) -> None:
    weight, _, seen = layer(rows=48, columns=96)
    config = awq.Config(input_scales=input_scales, **table)
    mine, (naive,) = awq.Method().compress(weight, seen, config), awq.Method().baselines(weight, seen, config).values()
    assert mine.stored_bits() == naive.stored_bits()
    error, base = (relative_error(weight, p.dequantize(), seen.hessian_II) for p in (mine, naive))
    if table.get("clip") == "max" and not input_scales:
        assert error == base, "nothing is left to search"
    else:
        assert error < 0.95 * base


def test_the_chosen_exponent_is_the_best_of_all_tried(layer: Callable[..., Any]) -> None:
    weight, inputs, seen = layer(rows=8, columns=32)
    config = awq.Config(bits=3, alphas=10, clip="max")
    chosen = awq.search_scale(weight, seen.hessian_II, config)

    def error(scale: torch.Tensor) -> float:
        scaled = weight * scale
        dense = int_grid.nearest(scaled, int_grid.fit(scaled, config)).dequantize() / scale
        return float((inputs.double() @ (dense - weight).double().T).square().sum())

    rms = inputs.double().square().mean(0).sqrt()
    for step in range(11):
        raised = rms ** (step / 10)
        tried = (raised / (raised.max() * raised.min()).sqrt()).bfloat16().float()
        assert error(chosen) <= error(tried) * (1 + 1e-9)


def test_a_channel_with_large_inputs_is_stored_finer(layer: Callable[..., Any]) -> None:
    weight, inputs, _ = layer(rows=32)
    inputs[:, 7] *= 60
    seen = Statistics(inputs.double().T @ inputs.double(), len(inputs))
    config = awq.Config(bits=3, group_size=0)
    mine, naive = awq.Method().compress(weight, seen, config), awq.Method().baselines(weight, seen, config)["rtn"]
    errors = [(p.dequantize() - weight)[:, 7].norm() for p in (mine, naive)]
    assert errors[0] < 0.5 * errors[1]


def test_even_inputs_need_no_scales(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer()
    packed = awq.Method().compress(weight, Statistics(3 * torch.eye(64), 9), awq.Config())
    assert isinstance(packed, awq.ScaledPacked)
    assert torch.equal(packed.scale_I, torch.ones(64, dtype=torch.bfloat16))
    plain = rtn.Method().compress(weight, Statistics(), rtn.Config(bits=4, group_size=32))
    assert torch.equal(packed.dequantize(), plain.dequantize())


def test_an_input_that_is_always_zero_is_no_reason_to_fail(layer: Callable[..., Any]) -> None:
    weight, inputs, _ = layer()
    inputs[:, :3] = 0.0
    for moment in (inputs.double().T @ inputs.double(), torch.zeros(64, 64)):
        dense = awq.Method().compress(weight, Statistics(moment, len(inputs)), awq.Config()).dequantize()
        assert bool(torch.isfinite(dense).all())
        assert relative_error(weight, dense) < 0.1


def test_input_scales_are_counted_and_come_back(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    scaled, plain = (awq.Method().compress(weight, seen, awq.Config(input_scales=s)) for s in (True, False))
    assert scaled.stored_bits() == plain.stored_bits() + 16 * 64
    assert torch.equal(awq.Method().restore(scaled.tensors(), awq.Config()).dequantize(), scaled.dequantize())
    assert scaled.scheme() is None


def test_without_input_scales_any_reader_knows_the_layout(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    packed = awq.Method().compress(weight, seen, awq.Config(input_scales=False))
    theirs = rtn.Method().compress(weight, seen, rtn.Config(bits=4, group_size=32))
    assert packed.scheme() == theirs.scheme()
    assert packed.tensors().keys() == theirs.tensors().keys()


def test_the_gain_holds_on_inputs_it_never_saw(layer: Callable[..., Any]) -> None:
    weight, inputs, _ = layer(rows=48, columns=64, tokens=2000)
    shown, held = inputs[:1000].double(), inputs[1000:].double()
    seen, config = Statistics(shown.T @ shown, 1000), awq.Config(bits=3, group_size=0)
    mine, naive = awq.Method().compress(weight, seen, config), awq.Method().baselines(weight, seen, config)["rtn"]
    error, base = (relative_error(weight, p.dequantize(), held.T @ held) for p in (mine, naive))
    assert error < 0.9 * base


def test_more_exponents_are_never_worse(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=24)
    losses = []
    for alphas in (1, 5, 20):
        config = awq.Config(bits=3, group_size=0, alphas=alphas, clip="max")
        scale = awq.search_scale(weight, seen.hessian_II, config)
        dense = int_grid.nearest(weight * scale, int_grid.fit(weight * scale, config)).dequantize() / scale
        losses.append(awq.output_loss(dense - weight, seen.hessian_II))
    assert losses == sorted(losses, reverse=True)


def test_calibration_is_required() -> None:
    with pytest.raises(ValueError, match="awq needs calibration"):
        awq.Method().compress(torch.randn(2, 4), Statistics(), awq.Config())
