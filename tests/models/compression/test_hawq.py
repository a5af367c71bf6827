"""HAWQ's options and costs; the integer program is tested where it is solved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from models.compression import gptq, hawq, rtn
from models.compression.base import Cost, Statistics

METHOD = hawq.Method()


def test_a_layer_alone_is_gptq_or_round_to_nearest(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    mine = METHOD.compress(weight, seen, hawq.Config(bits=3)).dequantize()
    assert torch.equal(mine, gptq.Method().compress(weight, seen, gptq.Config(bits=3)).dequantize())
    near = METHOD.compress(weight, seen, hawq.Config(bits=3, rounding="nearest"))
    assert torch.equal(
        near.dequantize(), rtn.Method().compress(weight, seen, rtn.Config(bits=3, group_size=32)).dequantize()
    )


def test_every_width_is_offered_and_offers_nothing_further() -> None:
    allocation = METHOD.allocation(hawq.Config(widths=(8, 3), group_size=0, budget=3.0, tied_layers=("*.q_proj",)))
    assert allocation is not None
    assert [option.bits for option in allocation.options] == [3, 8]
    assert all(option.group_size == 0 and METHOD.allocation(option) is None for option in allocation.options)
    assert (allocation.budget, allocation.tied_layers) == (3.0, ("*.q_proj",))
    assert METHOD.allocation(hawq.Config(budget=0)) is None


def cost(weight: torch.Tensor, seen: Statistics, width: int) -> Cost:
    """Return the cost of one width."""
    return METHOD.cost(weight, seen, hawq.Config(bits=width))


def test_curvature_costs_are_the_second_order_change_of_the_loss(layer: Callable[..., Any]) -> None:
    """For a loss of curvature c along every weight, moving the weights by e costs c |e|^2 / 2."""
    weight, _, _ = layer()
    packed = rtn.Method().compress(weight, Statistics(), rtn.Config(bits=3, group_size=32))
    error = (packed.dequantize() - weight).double()
    found = cost(weight, Statistics(curvature=0.7), 3)
    assert found.stored_bits == packed.stored_bits()
    assert found.loss == pytest.approx(0.7 * float(error.square().sum()) / 2)


def test_gradient_costs_weigh_every_weight(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer()
    fisher = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
    error = rtn.Method().compress(weight, Statistics(), rtn.Config(bits=3, group_size=32)).dequantize() - weight
    found = cost(weight, Statistics(fisher_OI=fisher), 3).loss
    assert found == pytest.approx(float((fisher * error.square()).sum()) / 2, rel=1e-5)


def test_output_costs_are_relative_errors_of_the_outputs(layer: Callable[..., Any]) -> None:
    weight, inputs, seen = layer()
    dense = rtn.Method().compress(weight, Statistics(), rtn.Config(bits=3, group_size=32)).dequantize()
    wanted = inputs.double() @ weight.double().T
    expected = (inputs.double() @ dense.double().T - wanted).square().sum() / wanted.square().sum()
    assert cost(weight, seen, 3).loss == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind", ["curvature", "gradients", "hessian"])
def test_wider_is_larger_and_costs_less(kind: str, layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    shown = {
        "curvature": Statistics(curvature=1.0),
        "gradients": Statistics(fisher_OI=torch.ones_like(weight)),
        "hessian": seen,
    }[kind]
    costs = [cost(weight, shown, width) for width in (2, 3, 4, 8)]
    bits, losses = [c.stored_bits for c in costs], [c.loss for c in costs]
    assert bits == sorted(bits)
    assert losses == sorted(losses, reverse=True)


def test_noise_below_zero_costs_nothing(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer()
    assert cost(weight, Statistics(curvature=-3.0), 2).loss == 0.0


@pytest.mark.parametrize("widths", [(1, 4), (4, 9), (4, 4), ()])
def test_widths_that_cannot_be_are_refused(widths: Any) -> None:
    with pytest.raises(ValidationError, match=r"widths = \[|at least 1"):
        hawq.Config(widths=widths)


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({}, "4p75bits-g32"),
        ({"budget": 3.5, "group_size": 0}, "3p5bits-channel"),
        ({"budget": 0, "bits": 3}, "int3-g32"),
    ],
)
def test_labels_name_the_budget(values: dict[str, Any], label: str) -> None:
    assert hawq.Config(**values).label == label


def test_calibration_is_required() -> None:
    for rounding in ("gptq", "nearest"):
        with pytest.raises(ValueError, match="hawq needs calibration"):
            METHOD.compress(torch.randn(2, 4), Statistics(), hawq.Config(rounding=rounding))
