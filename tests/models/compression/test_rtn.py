"""Round to nearest: its error follows the theory of uniform rounding."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from models.compression import rtn
from models.compression.base import Statistics, relative_error


def test_each_bit_quarters_the_squared_error() -> None:
    weight = torch.rand(64, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    errors = {
        bits: relative_error(weight, rtn.Method().compress(weight, Statistics(), rtn.Config(bits=bits)).dequantize())
        for bits in (4, 5, 6, 7)
    }
    for bits in (4, 5, 6):
        assert 3.3 < errors[bits] / errors[bits + 1] < 4.9


def test_smaller_groups_cost_bits_and_buy_accuracy() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    packed = [rtn.Method().compress(weight, Statistics(), rtn.Config(bits=4, group_size=size)) for size in (0, 64, 16)]
    bits = [p.stored_bits() for p in packed]
    errors = [relative_error(weight, p.dequantize()) for p in packed]
    assert bits == sorted(bits)
    assert errors == sorted(errors, reverse=True)


def test_a_zero_point_helps_one_sided_weights() -> None:
    weight = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    one, two = (
        relative_error(
            weight, rtn.Method().compress(weight, Statistics(), rtn.Config(bits=4, symmetric=s)).dequantize()
        )
        for s in (True, False)
    )
    assert two < 0.5 * one


def test_calibration_is_neither_needed_nor_used() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    without = rtn.Method().compress(weight, Statistics(), rtn.Config(bits=4)).dequantize()
    assert torch.equal(
        without, rtn.Method().compress(weight, Statistics(torch.eye(32), 9), rtn.Config(bits=4)).dequantize()
    )


def test_half_precision_weights_are_taken() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert relative_error(weight, rtn.Method().compress(weight, Statistics(), rtn.Config()).dequantize()) < 1e-4


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        rtn.Config().bits = 4
