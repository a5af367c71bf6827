"""Weights on a handful of levels: digits of base 2, 3 or 4 packed into bytes, and a step for each row or matrix.

Layout (ours: no public format holds 1, 1.6 or shifted 2-bit weights):

    weight_codes  uint8 [O, ceil(I / k)]  k digits a byte, lowest first: k = 8 (2 levels), 5 (3 levels), 4 (4 levels)
    weight_scale  [O] bfloat16, or [1] float32: the step between two levels
    weight_shape  int64 [2]

A digit d stands for step * (d - (levels - 1) / 2): the levels lie evenly around zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from models.compression.base import Packed
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

PER_BYTE = {2: 8, 3: 5, 4: 4}
"""Levels -> digits in a byte."""


@dataclass(frozen=True)
class LevelPacked(Packed):
    """A matrix on `levels` levels."""

    digits_OI: Tensor
    """uint8, 0 to levels - 1."""
    step: Tensor
    """[O] bfloat16 or [1] float32."""
    levels: int

    def dequantize(self) -> Tensor:
        """Return the weight [O, I], float32."""
        centred_OI = self.digits_OI.to(torch.float32) - (self.levels - 1) / 2
        return centred_OI * self.step.to(torch.float32).unsqueeze(-1)

    def tensors(self) -> dict[str, Tensor]:
        """Return what the module's docstring lists."""
        return {
            "weight_codes": pack_digits(self.digits_OI, self.levels),
            "weight_scale": self.step,
            "weight_shape": torch.tensor(self.digits_OI.shape, dtype=torch.int64),
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], levels: int) -> Self:
        """Rebuild a packed weight from its stored tensors."""
        columns = int(tensors["weight_shape"][1])
        return cls(unpack_digits(tensors["weight_codes"], levels, columns), tensors["weight_scale"], levels)


def pack_digits(digits_OI: Tensor, base: int) -> Tensor:
    """Return uint8 [O, ceil(I / k)] with k digits of the base in each byte, lowest first."""
    count = PER_BYTE[base]
    padded = torch.nn.functional.pad(digits_OI.to(torch.uint8), (0, -digits_OI.shape[1] % count))
    places = torch.tensor([base**place for place in range(count)], dtype=torch.uint8, device=digits_OI.device)
    return (padded.unflatten(1, (-1, count)) * places).sum(-1, dtype=torch.uint8)


def unpack_digits(bytes_OB: Tensor, base: int, columns: int) -> Tensor:
    """Return the digits [O, columns], uint8."""
    powers = [base**place for place in range(PER_BYTE[base])]
    places = torch.tensor(powers, dtype=torch.uint8, device=bytes_OB.device)
    return (bytes_OB.unsqueeze(-1) // places % base).flatten(1)[:, :columns].contiguous()
