"""Dyadic requantization: from sums of integer products to the next integers without a real number (HAWQ-V3, I-BERT).

A layer with integer inputs and weights sums q = sum x_int w_int in 32 bits. What follows reads q S_w S_x / S_y, and the
real factor is replaced by b / 2^c with whole b and c: one integer product, one addition, one shift (HAWQ-V3, arXiv
2011.10680; I-BERT, arXiv 2101.01321). Halves are rounded away from zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

BITS = 31
"""Bits of b, which fits a signed 32-bit register; a product with a 32-bit sum fits 64 bits."""
_LARGEST_SHIFT = 63


def dyadic(scale: Tensor, bits: int = BITS) -> tuple[Tensor, Tensor]:
    """Return whole numbers b and c, int64, with |b / 2^c - scale| <= 2^-bits scale and 2^(bits-1) <= b < 2^bits.

    Args:
        scale: factors of any shape, positive and below 2^(bits - 1).
        bits: bits of b.

    Raises:
        ValueError: bits or a factor outside its range.
    """
    if not 2 <= bits <= BITS:
        raise ValueError(f"dyadic: bits = {bits}; valid: 2 to {BITS}")
    # The comparison is also false for NaN.
    if not bool(((scale > 0) & (scale < 2.0 ** (bits - 1))).all()):
        raise ValueError(
            f"dyadic: factors reach from {scale.min():g} to {scale.max():g}; valid: 0 < scale < 2^{bits - 1}"
        )
    mantissa, exponent = torch.frexp(scale.double())
    factor = torch.ldexp(mantissa, torch.tensor(bits)).round().to(torch.int64)
    # A mantissa just below one rounds up to 2^bits, which is half as much with one shift less.
    over = (factor >> bits) > 0
    return torch.where(over, factor >> 1, factor), bits - exponent.to(torch.int64) - over.to(torch.int64)


def requantize(sums: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """Return sums * b / 2^c rounded to whole numbers, halves away from zero, in 64-bit integers.

    Args:
        sums: int32 accumulators.
        factor: b of `dyadic`, broadcast against the sums.
        shift: c of `dyadic`.
    """
    product = sums.to(torch.int64) * factor
    # No product reaches 2^62, so beyond this shift every result is zero, as it is here.
    shift = shift.clamp(max=_LARGEST_SHIFT)
    half = torch.where(shift > 0, torch.ones_like(shift) << (shift - 1).clamp(min=0), 0)
    size = (product.abs() + half) >> shift
    return torch.where(product < 0, -size, size)
