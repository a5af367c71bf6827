"""The two 8-bit floating-point formats, written out: E4M3 and E5M2 (Micikevicius et al. 2022, arXiv 2209.05433).

A code is sign, exponent and mantissa from the highest bit on. Below the smallest normal number the exponent stays and
the leading one is gone. E4M3 has no infinity and one NaN for each sign (all ones); E5M2 follows IEEE 754.
Magnitudes grow with their codes, so the nearest value is found among midpoints, and of two equally near ones the even
code wins, which is IEEE's round to nearest even.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


@dataclass(frozen=True)
class Format:
    """One of the formats."""

    mantissa: int
    """Bits of the mantissa."""
    bias: int
    last: int
    """Code of the largest finite magnitude."""
    overflow: int
    """Code of what lies beyond it: infinity, or NaN where there is none."""
    nan: int

    @property
    def largest(self) -> float:
        """Largest finite magnitude."""
        return float(magnitudes(self)[-1])


E4M3 = Format(mantissa=3, bias=7, last=0x7E, overflow=0x7F, nan=0x7F)
E5M2 = Format(mantissa=2, bias=15, last=0x7B, overflow=0x7C, nan=0x7F)


@functools.cache
def magnitudes(form: Format) -> Tensor:
    """Return the finite magnitudes in the order of their codes, float64."""
    code = torch.arange(form.last + 1)
    exponent, fraction = code >> form.mantissa, (code % (1 << form.mantissa)).double() / (1 << form.mantissa)
    power = torch.exp2((exponent.clamp(min=1) - form.bias).double())
    return power * (fraction + (exponent > 0).double())


def decode(codes: Tensor, form: Format) -> Tensor:
    """Return the values of codes (uint8), float32."""
    place = codes.long() & 0x7F
    table = torch.full((128,), float("nan"))
    table[form.overflow] = float("inf") if form.overflow != form.nan else float("nan")
    table[: form.last + 1] = magnitudes(form).float()
    size = table.to(codes.device)[place]
    return torch.where(codes >= 0x80, -size, size)


def encode(values: Tensor, form: Format, *, saturate: bool = True) -> Tensor:
    """Return the nearest codes, uint8.

    Args:
        values: any real numbers; computed in float32.
        form: the format.
        saturate: beyond the largest magnitude stays there; otherwise it becomes infinity, or NaN in E4M3.
    """
    size = values.float().abs()
    table = magnitudes(form)
    step_above = table[-1] * 2 - table[-2]
    midpoints = ((torch.cat([table, step_above[None]])[1:] + table) / 2).float().to(values.device)
    below, above = (torch.bucketize(size, midpoints, right=side) for side in (False, True))
    place = torch.where(below % 2 == 0, below, above)
    limit = form.last if saturate else form.overflow
    place = torch.where(place > form.last, torch.full_like(place, limit), place)
    place = torch.where(torch.isnan(size), torch.full_like(place, form.nan), place)
    return (place + 0x80 * torch.signbit(values.float())).to(torch.uint8)
