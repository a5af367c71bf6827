"""NormalFloat: the published levels, nearest rounding, double quantization written out, and bits counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.compression.formats import normal_float
from models.compression.formats.normal_float import NormalFloatConfig

NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
"""As printed in the appendix of QLoRA."""
CONFIGS = [
    NormalFloatConfig(),
    NormalFloatConfig(bits=2, block=16, scale_bits=2, super_block=16, scale_dtype="bfloat16"),
    NormalFloatConfig(bits=3, block=32, scale_bits=4, super_block=64, scale_dtype="float16"),
    NormalFloatConfig(bits=8, block=64, scale_bits=3, super_block=16),
]


def test_four_bits_are_the_published_table() -> None:
    assert torch.allclose(normal_float.levels(4), torch.tensor(NF4), atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_rise_from_minus_one_through_zero_to_one(bits: int) -> None:
    found = normal_float.levels(bits).tolist()
    assert len(set(found)) == 2**bits
    assert found == sorted(found)
    assert (min(found), max(found)) == (-1.0, 1.0)
    assert found[2 ** (bits - 1) - 1] == 0.0


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_scales_are_quantized_twice_as_defined(config: NormalFloatConfig, layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(rows=40, columns=64)
    stored = normal_float.quantize(weight, config)
    largest = [float(block.abs().max()) for block in weight.flatten().split(config.block)]
    least, steps = min(largest), 2**config.scale_bits - 1
    assert float(stored.least) == least
    for start in range(0, len(largest), config.super_block):
        top = torch.tensor(max(largest[start : start + config.super_block]) - least)
        top = top.to(getattr(torch, config.scale_dtype)).float()
        for index in range(start, min(start + config.super_block, len(largest))):
            expected = min(steps, round((largest[index] - least) / float(top) * steps))
            assert int(stored.magnitudes[index]) == expected


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_weight_is_at_the_nearest_level(config: NormalFloatConfig, layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(rows=8, columns=64)
    stored = normal_float.quantize(weight, config)
    dense = stored.dequantize()
    for start in range(0, weight.numel(), config.block):
        span = slice(start, start + config.block)
        mine, found = weight.flatten()[span], dense.flatten()[span]
        scale = float(found.abs().max()) / float(
            normal_float.levels(config.bits)[stored.codes[span].long()].abs().max()
        )
        distance = (mine.unsqueeze(1) - normal_float.levels(config.bits) * scale).abs().amin(1)
        assert torch.allclose((mine - found).abs(), distance, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_bits_are_those_of_the_formula(config: NormalFloatConfig) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    stored = sum(t.numel() * t.element_size() for t in normal_float.quantize(weight, config).tensors().values()) * 8
    wide = 32 if config.scale_dtype == "float32" else 16
    formula = config.bits + config.scale_bits / config.block + wide / (config.block * config.super_block)
    assert stored == pytest.approx(formula * weight.numel() + 32 + 128, abs=8)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", [(5, 24), (7, 33), (1, 8)])
def test_matrices_come_back_bit_for_bit(config: NormalFloatConfig, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored = normal_float.quantize(weight, config)
    again = normal_float.restore(stored.tensors(), config)
    assert again.dequantize().shape == weight.shape
    assert torch.equal(again.dequantize(), stored.dequantize())


def test_zeros_stay_zeros_and_are_no_reason_to_fail() -> None:
    assert torch.equal(normal_float.quantize(torch.zeros(4, 32), NormalFloatConfig()).dequantize(), torch.zeros(4, 32))
    one = torch.zeros(4, 32)
    one[2, 5] = 3.0
    assert float(normal_float.quantize(one, NormalFloatConfig(block=16)).dequantize()[2, 5]) == 3.0


def test_it_suits_normal_weights_better_than_an_even_grid() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    found = normal_float.quantize(weight, NormalFloatConfig(bits=3)).dequantize()
    scale = weight.view(-1, 64).abs().amax(1, keepdim=True) / 3.5
    even = (((weight.view(-1, 64) / scale - 0.5).round() + 0.5).clamp(-3.5, 3.5) * scale).view(weight.shape)
    assert (found - weight).square().sum() < 0.95 * (even - weight).square().sum()


@given(bits=st.sampled_from([1, 2, 3, 4, 8]), count=st.integers(1, 60), seed=st.integers(0, 50))
def test_codes_survive_packing(bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count,), generator=generator).to(torch.uint8)
    packed = normal_float.pack_codes(codes, bits)
    assert len(packed) == -(-count * bits // 8)
    assert torch.equal(normal_float.unpack_codes(packed, bits, count), codes)
