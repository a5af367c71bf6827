"""NormalFloat: levels at the quantiles of a normal distribution, scales of blocks that are themselves quantized.

A matrix is cut into blocks of B0 consecutive weights. Each is stored as b-bit indices of levels in [-1, 1], times its
largest magnitude; those magnitudes, less the smallest of the matrix, are stored in b0 bits, times the largest of B1
neighbours in b1 bits. That is b + b0 / B0 + b1 / (B0 B1) bits a weight (QLoRA, arXiv 2305.14314; LQ-LoRA, 2311.12023).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from models.compression.base import MethodConfig
from models.compression.formats.binary import pack_flat, unpack_flat
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

_OFFSET = 0.9677083
"""Quantile of the outermost level."""


class NormalFloatConfig(MethodConfig):
    """Parameters of NormalFloat storage."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits of one stored weight")
    block: Literal[16, 32, 64] = Field(64, description="weights that share a magnitude")
    scale_bits: Literal[2, 3, 4, 8] = Field(8, description="bits of one stored magnitude")
    super_block: Literal[16, 64, 256] = Field(256, description="magnitudes that share a scale")
    scale_dtype: Literal["bfloat16", "float16", "float32"] = Field("float32", description="type of those scales")


@dataclass(frozen=True)
class NormalFloat:
    """A matrix in NormalFloat."""

    codes: Tensor
    """uint8 [O * I], indices of levels."""
    magnitudes: Tensor
    """uint8 [blocks]."""
    tops: Tensor
    """[super blocks]."""
    least: Tensor
    """float32 [1], the smallest magnitude."""
    shape: tuple[int, int]
    config: NormalFloatConfig

    def dequantize(self) -> Tensor:
        """Return the weight [O, I], float32."""
        scale = _scales(self.magnitudes, self.tops, self.least, self.config)
        unit = levels(self.config.bits).to(self.codes.device)[self.codes.long()].view(self.shape)
        return _expand(scale, self.config.block, self.shape) * unit

    def to(self, device: torch.device) -> NormalFloat:
        """Return the same on another device."""
        codes, magnitudes, tops, least = (t.to(device) for t in (self.codes, self.magnitudes, self.tops, self.least))
        return replace(self, codes=codes, magnitudes=magnitudes, tops=tops, least=least)

    def tensors(self) -> dict[str, Tensor]:
        """Return codes and magnitudes as packed bits, lowest bit first, and everything else."""
        return {
            "weight_codes": pack_codes(self.codes, self.config.bits),
            "weight_magnitudes": pack_codes(self.magnitudes, self.config.scale_bits),
            "weight_tops": self.tops,
            "weight_least": self.least,
            "weight_shape": torch.tensor(self.shape, dtype=torch.int64),
        }


@functools.cache
def levels(bits: int) -> Tensor:
    """Return the 2^bits levels on the CPU, increasing from -1 to 1, zero among them; one more above zero than below."""
    half = 1 << (bits - 1)
    below = torch.special.ndtri(torch.linspace(1 - _OFFSET, 0.5, half, dtype=torch.float64))
    above = torch.special.ndtri(torch.linspace(0.5, _OFFSET, half + 1, dtype=torch.float64))[1:]
    both = torch.cat([below, above])
    both[half - 1] = 0.0
    return (both / both.abs().max()).float()


def quantize(weight_OI: Tensor, config: NormalFloatConfig) -> NormalFloat:
    """Return the matrix in NormalFloat: every weight at the level nearest to it, given its stored scale."""
    rows, columns = weight_OI.shape
    flat = weight_OI.detach().float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % config.block)).view(-1, config.block)
    magnitude = blocks.abs().amax(1)
    least = magnitude.min().view(1)
    above = torch.nn.functional.pad(magnitude - least, (0, -len(magnitude) % config.super_block))
    tops = above.view(-1, config.super_block).amax(1).to(getattr(torch, config.scale_dtype))
    steps = (1 << config.scale_bits) - 1
    share = (magnitude - least) / _spread(tops, config.super_block, len(magnitude)).clamp(min=1e-30)
    magnitudes = (share * steps).round().clamp(0, steps).to(torch.uint8)
    scale = _scales(magnitudes, tops, least, config).clamp(min=1e-30)
    points = levels(config.bits).to(weight_OI.device)
    middles = (points[1:] + points[:-1]) / 2
    codes = torch.bucketize(weight_OI.float() / _expand(scale, config.block, (rows, columns)), middles)
    return NormalFloat(codes.flatten().to(torch.uint8), magnitudes, tops, least, (rows, columns), config)


def restore(tensors: Mapping[str, Tensor], config: NormalFloatConfig) -> NormalFloat:
    """Rebuild a matrix from its stored tensors."""
    rows, columns = tensors["weight_shape"].tolist()
    count = rows * columns
    return NormalFloat(
        unpack_codes(tensors["weight_codes"], config.bits, count),
        unpack_codes(tensors["weight_magnitudes"], config.scale_bits, -(-count // config.block)),
        tensors["weight_tops"],
        tensors["weight_least"],
        (rows, columns),
        config,
    )


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return unsigned codes of so many bits as uint8, lowest bit first, nothing between them."""
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    return pack_flat(((codes.unsqueeze(1) >> places) & 1).bool().flatten())


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return `count` unsigned codes, uint8."""
    planes = unpack_flat(packed, count * bits).view(count, bits).to(torch.uint8)
    return (planes << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(1, dtype=torch.uint8)


def _scales(magnitudes: Tensor, tops: Tensor, least: Tensor, config: NormalFloatConfig) -> Tensor:
    top = _spread(tops, config.super_block, len(magnitudes))
    return least + magnitudes.float() / ((1 << config.scale_bits) - 1) * top


def _spread(tops: Tensor, size: int, count: int) -> Tensor:
    return tops.float().repeat_interleave(size)[:count]


def _expand(scale: Tensor, block: int, shape: tuple[int, int]) -> Tensor:
    return scale.repeat_interleave(block)[: shape[0] * shape[1]].view(shape)
