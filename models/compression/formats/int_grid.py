"""Integer grids: scales with or without a zero point, codes, and their packed storage.

The storage is the `pack-quantized` layout of compressed-tensors: `weight_packed` int32 holds the codes densely,
32 codes of b bits in b words; `weight_scale` [O, G]; `weight_zero_point` packed along O; `weight_shape`.
Scales are kept in bfloat16, which has the range of float32, and codes are chosen against the scale as stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from models.compression.base import MethodConfig, Packed
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

_SHRINKS = tuple(1.0 - 0.02 * step for step in range(31))
"""Fractions of the full range that the clip search tries: 1.00 down to 0.40."""


class GridConfig(MethodConfig):
    """Parameters of an integer grid."""

    bits: int = Field(8, ge=2, le=8, description="bits of one stored weight")
    group_size: int = Field(
        0, ge=0, le=65536, description="weights that share a scale along a row; 0: the whole row (channel)"
    )
    symmetric: bool = Field(True, description="no zero point; false stores one for each scale")
    clip: Literal["mse", "max"] = Field(
        "mse", description="range of a group: the one with the least squared error, or the largest weight"
    )

    @property
    def label(self) -> str:
        """For instance `int4-g32`, `int8-channel`, `uint4-g64` (with zero points)."""
        place = f"g{self.group_size}" if self.group_size else "channel"
        return f"{'' if self.symmetric else 'u'}int{self.bits}-{place}"

    def fitted(self, columns: Collection[int]) -> Self:
        """Return these parameters with a group size that divides every width in `columns`."""
        size = self.group_size
        return self.model_copy(update={"group_size": group_for(math.gcd(*columns), size)}) if size else self


@dataclass(frozen=True)
class Grid:
    """Where the codes of a matrix lie: `value = (code - zero) * scale`, one pair for each group of S columns."""

    bits: int
    scale_OG: Tensor
    """float32, exactly representable in bfloat16, positive."""
    zero_OG: Tensor | None = None
    """float32 whole numbers inside the code range; None for a symmetric grid."""

    @property
    def lowest(self) -> int:
        """Smallest code; the largest is `-lowest - 1`."""
        return -(1 << (self.bits - 1))

    def encode(self, weight_OGS: Tensor) -> Tensor:
        """Return the nearest codes [O, G, S], int8."""
        scaled = weight_OGS.to(self.scale_OG.dtype) / self.scale_OG.unsqueeze(-1)
        shifted = scaled.round() if self.zero_OG is None else scaled.round() + self.zero_OG.unsqueeze(-1)
        return shifted.clamp(self.lowest, -self.lowest - 1).to(torch.int8)

    def decode(self, codes_OGS: Tensor) -> Tensor:
        """Return what codes [O, G, S] stand for, float32."""
        codes = codes_OGS.to(torch.float32)
        shifted = codes if self.zero_OG is None else codes - self.zero_OG.unsqueeze(-1)
        return shifted * self.scale_OG.unsqueeze(-1)

    def nearest(self, weight_OGS: Tensor) -> Tensor:
        """Return the nearest points [O, G, S] themselves, float32: `decode(encode(...))` in half the passes."""
        scale_OG1 = self.scale_OG.unsqueeze(-1)
        points_OGS = (weight_OGS / scale_OG1).round_()
        if self.zero_OG is None:
            return points_OGS.clamp_(self.lowest, -self.lowest - 1).mul_(scale_OG1)
        zero_OG1 = self.zero_OG.unsqueeze(-1)
        return points_OGS.add_(zero_OG1).clamp_(self.lowest, -self.lowest - 1).sub_(zero_OG1).mul_(scale_OG1)

    def column(self, group: int) -> Grid:
        """Return the grid of one group alone, G = 1."""
        zero = None if self.zero_OG is None else self.zero_OG[:, group : group + 1]
        return replace(self, scale_OG=self.scale_OG[:, group : group + 1], zero_OG=zero)


@dataclass(frozen=True)
class IntPacked(Packed):
    """Codes on a grid, stored in the pack-quantized layout."""

    codes_OI: Tensor
    """int8."""
    grid: Grid
    scale_dtype: Any
    """torch.bfloat16, or torch.float32 after `widened`."""

    def dequantize(self) -> Tensor:
        """Return the weight [O, I], float32."""
        return self.grid.decode(grouped(self.codes_OI, self.grid.scale_OG.shape[1])).flatten(1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors under the names of the pack-quantized layout."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        stored = {
            "weight_packed": pack_to_int32(self.codes_OI, self.grid.bits),
            "weight_scale": self.grid.scale_OG.to(self.scale_dtype).contiguous(),
            "weight_shape": torch.tensor(self.codes_OI.shape, dtype=torch.int64),
        }
        if self.grid.zero_OG is not None:
            zero = self.grid.zero_OG.to(torch.int8)
            stored["weight_zero_point"] = pack_to_int32(zero, self.grid.bits, packed_dim=0)
        return stored

    def scheme(self) -> dict[str, Any]:
        """Return the compressed-tensors quantization arguments of this weight."""
        groups, columns = self.grid.scale_OG.shape[1], self.codes_OI.shape[1]
        return {
            "num_bits": self.grid.bits,
            "type": "int",
            "symmetric": self.grid.zero_OG is None,
            "strategy": "channel" if groups == 1 else "group",
            "group_size": None if groups == 1 else columns // groups,
            "dynamic": False,
        }

    def widened(self) -> IntPacked:
        """Return the same codes with float32 scales."""
        return replace(self, scale_dtype=torch.float32)


def fit(weight_OI: Tensor, config: GridConfig, *, loss: Callable[[Tensor], Tensor] | None = None) -> Grid:
    """Choose the grid of every group of a matrix.

    The group size is lowered to the greatest common divisor with I where it does not divide I.

    Args:
        weight_OI: the weight.
        config: bits, groups, and whether ranges are searched.
        loss: error [O, G, S] -> what the search makes least [O, G]; None: the sum of squares.
    """
    measure = loss or _sum_of_squares
    size = group_for(weight_OI.shape[1], config.group_size)
    weight_OGS = grouped(weight_OI.to(torch.float32), weight_OI.shape[1] // size)
    ends = _ends(weight_OGS, config)
    best = _grid(ends, 1.0, config)
    if config.clip == "max":
        return best
    least = measure(_rounding_error(weight_OGS, best))
    for shrink in _SHRINKS[1:]:
        other = _grid(ends, shrink, config)
        error = measure(_rounding_error(weight_OGS, other))
        better = error < least
        least = torch.where(better, error, least)
        best = _choose(better, other, best)
    return best


def nearest(weight_OI: Tensor, grid: Grid) -> IntPacked:
    """Round every weight to its nearest point of the grid."""
    codes_OI = grid.encode(grouped(weight_OI, grid.scale_OG.shape[1])).flatten(1)
    return IntPacked(codes_OI, grid, torch.bfloat16)


def restore(tensors: Mapping[str, Tensor], bits: int) -> IntPacked:
    """Rebuild a packed weight from its stored tensors."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape, scale = torch.Size(tensors["weight_shape"].tolist()), tensors["weight_scale"]
    zero = tensors.get("weight_zero_point")
    if zero is not None:
        zero = unpack_from_int32(zero, bits, scale.shape, packed_dim=0).to(torch.float32)
    codes_OI = unpack_from_int32(tensors["weight_packed"], bits, shape)
    return IntPacked(codes_OI, Grid(bits, scale.to(torch.float32), zero), scale.dtype)


def group_for(columns: int, group_size: int) -> int:
    """Return the group size used for a row of `columns` weights: a divisor of it; 0 asks for the whole row."""
    return math.gcd(columns, group_size) if group_size else columns


def grouped(matrix_OI: Tensor, groups: int) -> Tensor:
    """View [O, I] as [O, G, S]."""
    return matrix_OI.unflatten(1, (groups, -1))


def _ends(weight_OGS: Tensor, config: GridConfig) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest number [O, G] that the full range must hold, zero inside."""
    if config.symmetric:
        peak_OG = weight_OGS.abs().amax(-1)
        return -peak_OG, peak_OG
    return weight_OGS.amin(-1).clamp(max=0), weight_OGS.amax(-1).clamp(min=0)


def _grid(ends: tuple[Tensor, Tensor], shrink: float, config: GridConfig) -> Grid:
    """Return the grid over a fraction of the full range."""
    levels = (1 << config.bits) - 1
    if config.symmetric:
        return Grid(config.bits, storable(ends[1] * (shrink / (levels // 2))))
    low, high = (end * shrink for end in ends)
    scale_OG = storable((high - low) / levels)
    lowest = -(1 << (config.bits - 1))
    zero_OG = (lowest - (low / scale_OG).round()).clamp(lowest, -lowest - 1)
    return Grid(config.bits, scale_OG, zero_OG)


def storable(scale: Tensor) -> Tensor:
    """Round scales up to bfloat16, so that the largest weight is never clipped by the rounding of its own scale."""
    rounded = scale.to(torch.bfloat16).to(torch.float32)
    above = (scale * (1 + 2**-7)).to(torch.bfloat16).to(torch.float32)
    rounded = torch.where(rounded < scale, above, rounded)
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))


def _rounding_error(weight_OGS: Tensor, grid: Grid) -> Tensor:
    return grid.nearest(weight_OGS).sub_(weight_OGS)


def _sum_of_squares(error_OGS: Tensor) -> Tensor:
    return error_OGS.square_().sum(-1)


def _choose(mask_OG: Tensor, left: Grid, right: Grid) -> Grid:
    zero = None
    if left.zero_OG is not None and right.zero_OG is not None:
        zero = torch.where(mask_OG, left.zero_OG, right.zero_OG)
    return Grid(left.bits, torch.where(mask_OG, left.scale_OG, right.scale_OG), zero)
