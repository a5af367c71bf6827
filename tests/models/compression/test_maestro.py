"""Maestro: ordered factors find the truncated SVD, and cuts keep to their budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.compression import maestro
from models.compression.maestro import Config
from models.compression.modules.factored import FactoredLinear, tail_norms


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(12, 20, generator=torch.Generator().manual_seed(7))


def test_factors_multiply_to_the_weight_with_components_in_order(weight: Tensor) -> None:
    left, right = maestro.factors(weight)
    torch.testing.assert_close(left @ right, weight, atol=1e-5, rtol=0)
    expected = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(left.double().norm(dim=0) * right.double().norm(dim=1), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rank", [1, 5, 12, None])
def test_a_cut_layer_computes_the_truncated_svd(rank: int | None, weight: Tensor) -> None:
    linear = nn.Linear(20, 12)
    layer = FactoredLinear(linear, *maestro.factors(weight))
    layer.rank = rank
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    best = u[:, :rank] * s[:rank] @ vt[:rank]
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, best, linear.bias), atol=1e-5, rtol=1e-5)


def test_tail_norms_are_the_norms_of_all_tails(weight: Tensor) -> None:
    expected = sum(float(weight[first:].norm()) for first in range(12))
    assert float(tail_norms(weight)) == pytest.approx(expected, rel=1e-5)


def train(ordered: bool) -> list[float]:
    """Learn a 12 x 12 map with a geometric spectrum; return error over optimum when cut at 2, 4 and 6.

    The loss is that of isotropic inputs in expectation: the rows of the identity stand for all of them.
    """
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    spectrum = 0.8 ** torch.arange(12)
    target, steps = u * spectrum @ v.T, 1500
    layer = FactoredLinear(nn.Linear(12, 12, bias=False), *(0.3 * torch.randn(2, 12, 12, generator=generator)))
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / steps) ** 2
        if ordered:
            layer.rank = int(torch.randint(1, 13, (1,), generator=generator))
        loss = (layer(torch.eye(12)) - target.T).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        errors = [float((layer.left_OR[:, :k] @ layer.right_RI[:k] - target).square().sum()) for k in (2, 4, 6)]
    best = [float(spectrum[k:].square().sum()) for k in (2, 4, 6)]
    return [error / optimum for error, optimum in zip(errors, best, strict=True)]


def test_training_with_drawn_ranks_recovers_the_truncated_svd() -> None:
    """The abstract's claim, at every cut; the same factors trained without an order are the control."""
    ordered = train(ordered=True)
    assert all(1.0 - 1e-5 <= ratio <= 1.1 for ratio in ordered), ordered
    plain = train(ordered=False)
    assert all(ratio >= 2.0 for ratio in plain), plain


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("allocation", ["importance", "uniform"])
def test_ranks_keep_to_the_share(share: float, allocation: str) -> None:
    shapes = [(30, 50), (64, 16), (20, 20)]
    generator = torch.Generator().manual_seed(0)
    importances = [torch.rand(min(s), generator=generator).sort(descending=True).values for s in shapes]
    kept = maestro.ranks(importances, shapes, share, allocation)
    used = sum(min(rank * sum(s), s[0] * s[1]) for rank, s in zip(kept, shapes, strict=True))
    whole = sum(rows * columns for rows, columns in shapes)
    assert used <= share * whole
    assert all(rank >= 1 for rank in kept)
    # Not a component more would fit into the layer with the narrowest ones, unless that one is at its bound.
    assert used > share * whole - max(map(sum, shapes)) * (1 if allocation == "importance" else 3) or share == 0.8


def test_a_layer_with_more_important_components_keeps_more() -> None:
    steep, flat = 0.5 ** torch.arange(16.0), torch.ones(16)
    few, many = maestro.ranks([steep, flat], [(16, 16), (16, 16)], 0.6, "importance")
    assert few < many


def test_a_layer_that_needs_all_its_components_becomes_dense_where_the_share_has_room() -> None:
    """As factors, a 64 x 64 layer is as large as its weight at rank 32: rank 31 would lose a third for nothing."""
    steep, flat = 0.5 ** torch.arange(64.0), torch.ones(64)
    shapes = [(64, 64), (64, 64)]
    assert maestro.ranks([flat, flat], shapes, 1.0, "importance") == [64, 64]
    few, all_of_them = maestro.ranks([steep, flat], shapes, 0.75, "importance")
    assert all_of_them == 64
    assert 1 <= few <= 16, "what the dense layer left"
    assert max(maestro.ranks([flat, flat], shapes, 0.4, "importance")) < 32, "no room for a dense layer"


@pytest.mark.parametrize("allocation", ["importance", "uniform"])
def test_the_whole_share_leaves_layers_dense(allocation: str, weight: Tensor) -> None:
    model = nn.Sequential(nn.Linear(20, 12))
    model[0].weight = nn.Parameter(weight)
    config = Config.model_validate({"share": 1.0, "allocation": allocation, "cut": "start"})
    maestro.Method().transform(model, ["0"], config)
    assert isinstance(model[0], nn.Linear)
    assert maestro.Method().finish(model, config) == {}
    torch.testing.assert_close(model[0].weight.detach(), weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("bits", "dtype"), [(16, torch.bfloat16), (32, torch.float32)])
def test_stored_factors_come_back_and_compute_the_product(bits: int, dtype: torch.dtype, weight: Tensor) -> None:
    model = nn.Sequential(nn.Linear(20, 12, bias=False))
    model[0].weight = nn.Parameter(weight)
    config = Config.model_validate({"share": 0.5, "value_bits": bits, "steps": 0})
    maestro.Method().transform(model, ["0"], config)
    packed = maestro.Method().finish(model, config)["0"]
    again = maestro.Method().restore(packed.tensors(), config)
    assert torch.equal(again.dequantize(), packed.dequantize())
    assert all(tensor.dtype == dtype for tensor in packed.tensors().values())
    rank = packed.tensors()["weight_right"].shape[0]
    assert packed.stored_bits() == bits * rank * (20 + 12) <= bits * 0.5 * 20 * 12
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed.forward(x), x @ packed.dequantize().T, atol=1e-4, rtol=1e-4)


def test_divergence_is_zero_for_equal_logits_and_the_written_sum_otherwise() -> None:
    one, other = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    assert float(maestro.divergence(one, one)) == pytest.approx(0.0, abs=1e-6)
    p, q = one.softmax(-1), other.softmax(-1)
    assert float(maestro.divergence(one, other)) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
