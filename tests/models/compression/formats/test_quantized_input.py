"""Rounding of layer inputs against compressed-tensors, whose readers compute the child."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor

from models.compression import rtn
from models.compression.base import Packed, Statistics
from models.compression.formats import quantized_input


@pytest.fixture
def x() -> Tensor:
    """Inputs [2, 9, 64] of uneven tokens, one of them zero."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 9, 64, generator=generator) * torch.exp(torch.randn(2, 9, 1, generator=generator))
    values[1, 3] = 0
    return values


@pytest.fixture
def packed() -> Packed:
    """A packed weight [32, 64]."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    return rtn.Method().compress(weight, Statistics(), rtn.Config(bits=4))


def test_tokens_are_rounded_as_compressed_tensors_rounds_them(x: Tensor, packed: Packed) -> None:
    layer = quantized_input.wrap(packed, "int8")
    scheme = layer.input_scheme()
    assert scheme is not None
    args = QuantizationArgs(**scheme)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    assert torch.equal(layer.inputs(x), fake_quantize(x, scale, zero, args))


def test_a_static_scale_is_stored_and_used(x: Tensor, packed: Packed) -> None:
    layer = quantized_input.InputPacked(packed, scale=torch.tensor([0.03125]))
    args = QuantizationArgs(**layer.input_scheme())
    assert torch.equal(layer.inputs(x), fake_quantize(x, torch.tensor([0.03125]), torch.zeros(1), args))
    again = quantized_input.restore(packed, layer.tensors())
    assert torch.equal(again.inputs(x), layer.inputs(x))
    assert layer.stored_bits() == packed.stored_bits() + 32


def test_no_choice_is_no_wrapper(packed: Packed) -> None:
    assert quantized_input.wrap(packed, "none") is packed
    assert not packed.rounds_inputs
    assert quantized_input.wrap(packed, "int8").rounds_inputs


def test_forward_multiplies_the_rounded_inputs(x: Tensor, packed: Packed) -> None:
    layer = quantized_input.wrap(packed, "int8")
    expected = layer.inputs(x) @ packed.dequantize().T
    assert torch.allclose(layer.forward(x), expected, atol=1e-5)
    assert not torch.allclose(layer.forward(x), packed.forward(x), atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_levels_between_the_least_and_the_greatest_of_a_token(bits: int, x: Tensor) -> None:
    rounded = quantized_input.round_between(x, bits)
    step = (x.amax(-1) - x.amin(-1)).unsqueeze(-1) / (2**bits - 1)
    assert bool(((rounded - x).abs() <= step * 1.01).all())
    assert max(len(row.unique()) for row in rounded.flatten(0, 1)) <= 2**bits
    assert bool((rounded[1, 3] == 0).all())
    assert torch.equal(quantized_input.round_between(torch.zeros(3), bits), torch.zeros(3))


def test_zero_stays_zero_when_all_inputs_are_positive() -> None:
    x = torch.tensor([0.0, 5.0, 6.0, 7.0])
    assert quantized_input.round_between(x, 4)[0] == 0
