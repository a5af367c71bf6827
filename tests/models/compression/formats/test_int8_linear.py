"""A layer that computes in integers from end to end, beside the same layer with real rescaling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.compression import int8
from models.compression.base import Packed, Statistics
from models.compression.formats.int8_linear import DyadicPacked

RANDOM = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    """Inputs [600, 96] of uneven channels."""
    return torch.randn(600, 96, generator=RANDOM) * torch.exp(0.5 * torch.randn(96, generator=RANDOM))


@pytest.fixture(scope="module")
def pair(rows: Tensor) -> tuple[DyadicPacked, Packed]:
    """The same layer [80, 96] with integer and with real outputs."""
    weight = torch.randn(80, 96, generator=RANDOM) / 96**0.5
    seen = Statistics(rows.double().T @ rows.double(), len(rows), inputs_NI=rows)
    packed = int8.Method().compress(weight, seen, int8.Config(rescale="dyadic"))
    assert isinstance(packed, DyadicPacked)
    return packed, int8.Method().compress(weight, seen, int8.Config())


def test_a_layer_in_integers_is_within_one_code_of_real_rescaling(
    pair: tuple[DyadicPacked, Packed], rows: Tensor
) -> None:
    layer, plain = pair
    step = float(layer.output_scale)
    real = plain.forward(rows.double()) / step
    wanted = real.round().clamp(-128, 127)
    codes = layer.forward(rows) / step
    off = (codes - wanted).abs()
    assert float(off.max()) <= 1
    assert float((off > 0).double().mean()) < 1e-4
    assert len(codes.unique()) > 200, "nearly all 256 codes are in use, so a wrong factor would be seen"
    assert float((real.abs() > 127).double().mean()) < 0.01, "few outputs are cut off"


def test_sums_are_exact_integers(pair: tuple[DyadicPacked, Packed], rows: Tensor) -> None:
    layer, _ = pair
    codes = (rows[:9] / layer.input_scale).round().clamp(-128, 127).to(torch.int64)
    assert torch.equal(layer.sums(rows[:9]).long(), codes @ layer.codes_OI.long().T)
    assert bool((layer.inputs(rows[:9]) == codes * layer.input_scale).all())


def test_it_costs_one_scale_more_and_comes_back_as_it_was(pair: tuple[DyadicPacked, Packed], rows: Tensor) -> None:
    layer, plain = pair
    assert layer.stored_bits() == plain.stored_bits() + 32
    again = int8.Method().restore(layer.tensors(), int8.Config(rescale="dyadic"))
    assert torch.equal(again.forward(rows), layer.forward(rows))
    assert torch.equal(layer.widened().forward(rows), layer.forward(rows))
    assert again.scheme() is None, "no public layout computes so"
    assert torch.equal(layer.dequantize(), plain.dequantize())
    bias = torch.arange(80.0)
    assert torch.equal(layer.product(rows, layer.dequantize(), bias), layer.forward(rows) + bias)


def test_the_name_carries_the_choice_and_so_does_every_calibrator_tried() -> None:
    best = int8.Config(calibrator="best", rescale="dyadic")
    assert best.label == "best-dyadic"
    assert {config.rescale for config in int8.Method().candidates(best)} == {"dyadic"}
