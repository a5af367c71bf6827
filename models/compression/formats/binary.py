"""Binary approximations: two values for a set of weights of a row, w ~ mean + amplitude * sign(w - mean).

Means are taken over the members of the set only. (The released PB-LLM divides by the length of the whole row, which
makes the amplitude the smaller the more weights are left out.) Numbers are rounded to bfloat16 as they are stored, and
signs are chosen against the stored mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from models.compression.formats.sparse import pack_bits, unpack_bits
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


class Binary(NamedTuple):
    """One binary approximation of some weights of each row."""

    mean_O: Tensor
    """float32, exact in bfloat16."""
    amplitude_O: Tensor
    """float32, exact in bfloat16, not negative."""
    sign_OS: Tensor
    """bool, True for +1."""

    def dense(self) -> Tensor:
        """Return the approximation [O, S], float32."""
        return two_values(self.mean_O.unsqueeze(1), self.amplitude_O.unsqueeze(1), self.sign_OS)


def two_values(mean: Tensor, amplitude: Tensor, sign: Tensor) -> Tensor:
    """Return mean + amplitude where the sign is True, mean - amplitude elsewhere."""
    return torch.where(sign, mean + amplitude, mean - amplitude)


def fit(weight_OS: Tensor, member_OS: Tensor) -> Binary:
    """Return the binary approximation of the members of each row; the amplitude is the L2-optimal one for the mean.

    Args:
        weight_OS: weights.
        member_OS: bool, which of them count; a row without any gets zeros.
    """
    mean_O = bfloat(masked_mean(weight_OS, member_OS))
    centred_OS = weight_OS - mean_O.unsqueeze(1)
    return Binary(mean_O, bfloat(masked_mean(centred_OS.abs(), member_OS)), centred_OS >= 0)


def masked_mean(values_OS: Tensor, member_OS: Tensor) -> Tensor:
    """Return the mean of the members of each row [O]; zero where there are none."""
    return (values_OS * member_OS).sum(-1) / member_OS.sum(-1).clamp(min=1)


def bfloat(values: Tensor) -> Tensor:
    """Round to bfloat16, as float32."""
    return values.to(torch.bfloat16).to(torch.float32)


def pack_flat(bits_N: Tensor) -> Tensor:
    """Return bool bits as uint8 [ceil(N/8)], lowest bit first."""
    return pack_bits(bits_N.view(1, -1)).flatten()


def unpack_flat(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` bits as bool."""
    return unpack_bits(packed.view(1, -1), count).flatten()
