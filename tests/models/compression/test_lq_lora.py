"""LQ-LoRA: better than each part alone at equal storage, weighted where it is told, stopped at the best pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.compression import lq_lora
from models.compression.base import Statistics, relative_error
from models.compression.formats import normal_float
from models.compression.svd import truncated

PLAIN = {"weighting": "none", "rank": 4}


def fisher(weight: Tensor, *, rank_one: bool = True) -> Tensor:
    """Return uneven importances [O, I]."""
    generator = torch.Generator().manual_seed(3)
    rows, columns = (torch.exp(torch.randn(size, generator=generator)) for size in weight.shape)
    noise = 1.0 if rank_one else torch.rand(weight.shape, generator=generator)
    return torch.outer(rows, columns) * noise


def loftq(weight: Tensor, config: lq_lora.Config) -> Tensor:
    """Return what one turn of LoftQ gives, which rounds first: NF(W), then the adapter of what rounding lost."""
    rounded = normal_float.quantize(weight, config).dequantize()
    left, right = truncated(weight - rounded, config.rank)
    return rounded + left.bfloat16().float() @ right.bfloat16().float()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_closer_than_rounding_alone_and_than_one_turn_at_the_same_bytes(
    bits: int, layer: Callable[..., Any]
) -> None:
    weight, _, seen = layer(rows=48, columns=64)
    config = lq_lora.Config(bits=bits, **PLAIN)
    mine, (qlora,) = (
        lq_lora.Method().compress(weight, seen, config),
        lq_lora.Method().baselines(weight, seen, config).values(),
    )
    once = lq_lora.Method().compress(weight, seen, config.model_copy(update={"iterations": 1}))
    assert mine.stored_bits() == qlora.stored_bits() == once.stored_bits()
    errors = [relative_error(weight, p.dequantize()) for p in (mine, once, qlora)]
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < relative_error(weight, loftq(weight, config))


def test_the_first_adapter_is_of_the_weight_itself(layer: Callable[..., Any]) -> None:
    """The paper's order, Q = 0 first: the adapter takes the largest directions, and the rest is rounded."""
    weight, _, seen = layer()
    config = lq_lora.Config(iterations=1, **PLAIN)
    left, right = truncated(weight, 4)
    product = left.bfloat16().float() @ right.bfloat16().float()
    expected = product + normal_float.quantize(weight - product, config).dequantize()
    made = lq_lora.Method().compress(weight, seen, config).dequantize()
    assert torch.allclose(made, expected, atol=2e-3)
    assert not torch.allclose(made, loftq(weight, config), atol=2e-3)


def test_no_later_turn_would_have_been_better(layer: Callable[..., Any]) -> None:
    """The same turns by hand, past the first rise of the error: what is kept is the last pair before it."""
    weight, _, seen = layer(rows=32)
    config = lq_lora.Config(bits=3, **PLAIN)
    ones = torch.ones_like(weight)
    rest, errors = weight, list[float]()
    while len(errors) < 2 or errors[-1] < errors[-2]:
        left, right = lq_lora.low_rank(rest, ones, config.rank)
        product = left.float() @ right.float()
        rounded = normal_float.quantize(weight - product, config).dequantize()
        errors.append(float((rounded + product - weight).double().square().sum()))
        rest = weight - rounded
    kept = lq_lora.Method().compress(weight, seen, config).dequantize()
    assert float((kept - weight).double().square().sum()) == pytest.approx(errors[-2], rel=1e-6)
    assert len(errors) > 2, "more than one turn was worth taking"


def test_for_a_product_of_rows_and_columns_no_adapter_is_better(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(rows=12, columns=20)
    importance = fisher(weight)
    left, right = lq_lora.low_rank(weight, importance, 3)
    best = lq_lora.weighted_error(left.float() @ right.float() - weight, importance)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        other = left.float() * (1 + 0.05 * torch.randn(left.shape, generator=generator))
        assert lq_lora.weighted_error(other @ right.float() - weight, importance) > best


@pytest.mark.parametrize("rank_one", [True, False])
def test_gradients_draw_the_error_to_where_it_costs_little(rank_one: bool, layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=48)
    importance = fisher(weight, rank_one=rank_one)
    seen = replace(seen, fisher_OI=importance)
    errors = [
        lq_lora.weighted_error(
            lq_lora.Method().compress(weight, seen, lq_lora.Config(bits=2, weighting=w)).dequantize() - weight,
            importance,
        )
        for w in ("fisher", "none")
    ]
    assert errors[0] < 0.95 * errors[1]


def test_the_hessian_variant_weighs_columns_by_their_inputs(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    found = lq_lora.importance(weight, seen, lq_lora.Config(weighting="hessian"))
    diagonal = seen.hessian_II.diagonal().float()
    assert torch.allclose(found[5], diagonal)
    assert torch.equal(found[0], found[-1])


def test_the_adapter_is_counted(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=48, columns=64)
    bits = [
        lq_lora.Method().compress(weight, seen, lq_lora.Config(rank=r, weighting="none")).stored_bits() for r in (0, 8)
    ]
    assert bits[1] - bits[0] == 8 * 16 * (48 + 64)


def test_importances_of_zero_are_no_reason_to_fail(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    importance = fisher(weight)
    importance[:, :5] = 0.0
    importance[3] = 0.0
    for given in (importance, torch.zeros_like(weight)):
        dense = lq_lora.Method().compress(weight, replace(seen, fisher_OI=given), lq_lora.Config()).dequantize()
        assert bool(torch.isfinite(dense).all())


def test_a_budget_offers_every_storage_once() -> None:
    allocation = lq_lora.Method().allocation(lq_lora.Config(budget=3.0, rank=4))
    assert allocation is not None
    offered = allocation.options
    assert len(offered) == len({config.model_dump_json() for config in offered}) == 4 * 4 * 3 * 3 * 3
    assert all(config.rank == 4 and config.budget == 0 for config in offered)


@pytest.mark.parametrize("number", [0, 77, 200, 431])
def test_the_cost_of_a_storage_is_to_the_bit_what_it_stores(number: int, layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=20, columns=48)
    seen = replace(seen, fisher_OI=fisher(weight))
    allocation = lq_lora.Method().allocation(lq_lora.Config(budget=3.0, rank=3))
    assert allocation is not None
    choice = allocation.options[number]
    cost = lq_lora.Method().cost(weight, seen, choice)
    assert cost.stored_bits == lq_lora.Method().compress(weight, seen, choice).stored_bits()
    error = normal_float.quantize(weight, choice).dequantize() - weight
    assert cost.loss == pytest.approx(float((fisher(weight) * error.square()).sum()), rel=1e-4)


def test_predicted_losses_rank_storages_as_the_whole_method_does(layer: Callable[..., Any]) -> None:
    """The cost leaves the adapter out; over the widths the order must be that of the finished decompositions."""
    weight, _, seen = layer(rows=48)
    seen = replace(seen, fisher_OI=fisher(weight, rank_one=False))
    widths = [lq_lora.Config(bits=bits) for bits in (2, 3, 4, 8)]
    predicted = [lq_lora.Method().cost(weight, seen, config).loss for config in widths]
    finished = [
        lq_lora.weighted_error(lq_lora.Method().compress(weight, seen, config).dequantize() - weight, seen.fisher_OI)
        for config in widths
    ]
    assert predicted == sorted(predicted, reverse=True)
    assert finished == sorted(finished, reverse=True)
    assert all(done < start for done, start in zip(finished[:2], predicted[:2], strict=True))


def test_costs_are_by_gradients_only_where_those_are_the_weights() -> None:
    method = lq_lora.Method()
    for config, source in (({}, "gradients"), ({"weighting": "hessian"}, "hessian")):
        allocation = method.allocation(lq_lora.Config.model_validate(config | {"budget": 3.0}))
        assert allocation is not None
        assert allocation.sensitivity_source == source
    assert method.allocation(lq_lora.Config()) is None


@pytest.mark.parametrize(
    ("values", "label"),
    [({}, "nf4-r8"), ({"bits": 3, "rank": 16, "weighting": "none"}, "nf3-r16-none"), ({"budget": 2.75}, "2p75bits-r8")],
)
def test_labels_name_storage_and_rank(values: dict[str, Any], label: str) -> None:
    assert lq_lora.Config(**values).label == label


@pytest.mark.parametrize("weighting", ["fisher", "hessian"])
def test_what_the_weighting_needs_is_required(weighting: Any) -> None:
    with pytest.raises(ValueError, match="lq_lora needs calibration"):
        lq_lora.Method().compress(torch.randn(2, 4), Statistics(), lq_lora.Config(weighting=weighting))
