"""GPTQ against a slow, obvious GPTQ, and against the baseline on its own grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.compression import gptq, rtn
from models.compression.base import Statistics, relative_error
from models.compression.formats import int_grid


def reference(weight_OI: Tensor, seen: Statistics, config: gptq.Config) -> Tensor:
    """One row and one column at a time, inverting the Hessian of the free columns anew at every step."""
    assert seen.hessian_II is not None
    columns = weight_OI.shape[1]
    hessian = seen.hessian_II * 2 / seen.tokens
    hessian = hessian + config.damp * hessian.diagonal().mean() * torch.eye(columns)
    order = list(range(columns))
    if config.order == "activation":
        order.sort(key=lambda column: -float(hessian[column, column]))
    scales = int_grid.fit(weight_OI, config).scale_OG.double()
    size = int_grid.group_for(columns, config.group_size)
    top = 2 ** (config.bits - 1)
    stored = torch.zeros_like(weight_OI, dtype=torch.float64)
    for row in range(len(weight_OI)):
        weight = weight_OI[row].double().clone()
        for step, column in enumerate(order):
            scale = scales[row, column // size]
            stored[row, column] = (weight[column] / scale).round().clamp(-top, top - 1) * scale
            free = order[step:]
            inverse = hessian[free][:, free].inverse()
            weight[free] -= (weight[column] - stored[row, column]) / inverse[0, 0] * inverse[0]
    return stored


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize(("bits", "size"), [(4, 0), (4, 8), (3, 16), (2, 0)])
def test_it_is_the_algorithm_of_the_paper(order: Any, bits: int, size: int, layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=5, columns=32)
    config = gptq.Config(bits=bits, group_size=size, order=order)
    found = gptq.Method().compress(weight, seen, config).dequantize().double()
    assert torch.allclose(found, reference(weight, seen, config), atol=1e-6)


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outputs_are_closer_than_those_of_rounding_on_the_same_bits(
    bits: int, order: Any, layer: Callable[..., Any]
) -> None:
    weight, _, seen = layer(rows=48, columns=96, tokens=600)
    config = gptq.Config(bits=bits, order=order)
    mine = gptq.Method().compress(weight, seen, config)
    (naive,) = gptq.Method().baselines(weight, seen, config).values()
    assert mine.stored_bits() == naive.stored_bits()
    error, base = (relative_error(weight, p.dequantize(), seen.hessian_II) for p in (mine, naive))
    assert error < 0.75 * base


def test_the_gain_holds_on_inputs_it_never_saw(layer: Callable[..., Any]) -> None:
    weight, inputs, _ = layer(rows=48, columns=64, tokens=2000)
    shown, held = inputs[:1000].double(), inputs[1000:].double()
    seen = Statistics(shown.T @ shown, 1000)
    config = gptq.Config(bits=3)
    mine, naive = gptq.Method().compress(weight, seen, config), gptq.Method().baselines(weight, seen, config)["rtn"]
    held_moment = held.T @ held
    error, base = (relative_error(weight, p.dequantize(), held_moment) for p in (mine, naive))
    assert error < 0.8 * base


def test_the_null_arm_is_rtn_itself(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    naive = gptq.Method().baselines(weight, seen, gptq.Config(bits=4, group_size=16))["rtn"]
    theirs = rtn.Method().compress(weight, seen, rtn.Config(bits=4, group_size=16))
    assert torch.equal(naive.dequantize(), theirs.dequantize())


def test_without_correlations_it_is_rtn(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer()
    seen = Statistics(torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1), 100)
    config = gptq.Config(bits=4)
    assert torch.equal(
        gptq.Method().compress(weight, seen, config).dequantize(),
        gptq.Method().baselines(weight, seen, config)["rtn"].dequantize(),
    )


def test_zeros_of_a_pruned_parent_stay_when_asked(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    weight[:, 1::2] = 0.0
    kept = gptq.Method().compress(weight, seen, gptq.Config(keep_zeros=True)).dequantize()
    free = gptq.Method().compress(weight, seen, gptq.Config()).dequantize()
    assert bool((kept[:, 1::2] == 0).all())
    assert bool((free[:, 1::2] != 0).any())
    rounded = rtn.Method().compress(weight, seen, rtn.Config(bits=4, group_size=32)).dequantize()
    assert relative_error(weight, kept, seen.hessian_II) < relative_error(weight, rounded, seen.hessian_II)


def test_zero_points_work_too(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=32)
    config = gptq.Config(bits=3, symmetric=False)
    mine, naive = gptq.Method().compress(weight, seen, config), gptq.Method().baselines(weight, seen, config)["rtn"]
    error, base = (relative_error(weight, p.dequantize(), seen.hessian_II) for p in (mine, naive))
    assert error < 0.8 * base


def test_columns_are_visited_by_falling_activation() -> None:
    moment = torch.diag(torch.tensor([1.0, 5.0, 3.0, 5.0]))
    assert gptq.visit_order(moment, "activation").tolist() == [1, 3, 2, 0]
    assert gptq.visit_order(moment, "natural").tolist() == [0, 1, 2, 3]


def test_calibration_is_required(layer: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="gptq needs calibration"):
        gptq.Method().compress(torch.randn(2, 4), Statistics(), gptq.Config())
