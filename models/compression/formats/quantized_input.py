"""Quantized layer inputs: what a `Packed` weight multiplies is rounded first, for each token or with a fixed scale.

The arithmetic is that of compressed-tensors, so that its readers compute the same numbers: a dynamic scale is the
largest magnitude of a token over half the range of codes (127.5 for 8 bits), a static one is stored as `input_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from models.compression.base import Packed
from models.compression.formats.int_grid import GridConfig
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

Choice = Literal["none", "int8"]
"""Inputs of a layer as they are, or on 8 bits for each token."""


class RoundingConfig(GridConfig):
    """Parameters of methods that round weights to an integer grid, and may round inputs or learn the grid."""

    activations: Choice = Field(
        "none", description="inputs of the layers as they are, or on 8 bits for each token (W4A8)"
    )
    block_reconstruction: int = Field(
        0, ge=0, le=100_000, description="steps that learn scales and codes of a block from its output; 0: none"
    )

    @property
    def block_steps(self) -> int:
        """Steps that follow once the layers of a block are compressed."""
        return self.block_reconstruction

    @property
    def label(self) -> str:
        """As of the grid, with `-a8` where inputs are rounded and `-r100` after 100 steps of block reconstruction."""
        steps = f"-r{self.block_reconstruction}" if self.block_reconstruction else ""
        return super().label + ("-a8" if self.activations == "int8" else "") + steps


@dataclass(frozen=True)
class InputPacked(Packed):
    """A packed weight whose input is rounded to integers of `bits` bits."""

    weight: Packed
    bits: int = 8
    scale: Tensor | None = None
    """[1] float32, the static scale of the whole tensor; None takes one for each token as it comes."""

    @property
    def storage(self) -> str:
        """Return the layout of the weight."""
        return self.weight.storage

    def dequantize(self) -> Tensor:
        """Return the weight [O, I], float32."""
        return self.weight.dequantize()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the weight, and `input_scale` where it is static."""
        stored = self.weight.tensors()
        return stored if self.scale is None else stored | {"input_scale": self.scale}

    def inputs(self, x: Tensor) -> Tensor:
        """Return x [..., I] rounded to the integers of its scale."""
        scale = token_scale(x, self.bits) if self.scale is None else self.scale.to(x.device, x.dtype)
        return round_to(x, scale, self.bits)

    def scheme(self) -> dict[str, Any] | None:
        """Return the scheme of the weight."""
        return self.weight.scheme()

    def input_scheme(self) -> dict[str, Any]:
        """Return the compressed-tensors arguments of the inputs."""
        dynamic = self.scale is None
        shared = {"num_bits": self.bits, "type": "int", "symmetric": True}
        return shared | {"strategy": "token" if dynamic else "tensor", "dynamic": dynamic}

    def widened(self) -> Packed:
        """Return the same with a widened weight."""
        return replace(self, weight=self.weight.widened())


def wrap(weight: Packed, choice: Choice) -> Packed:
    """Return the weight with its inputs as chosen."""
    return weight if choice == "none" else InputPacked(weight)


def restore(weight: Packed, tensors: Mapping[str, Tensor]) -> Packed:
    """Return the weight with the static scale among its stored tensors."""
    return InputPacked(weight, scale=tensors["input_scale"])


def token_scale(x: Tensor, bits: int) -> Tensor:
    """Return the scale of each token [..., 1], positive."""
    scale = x.abs().amax(-1, keepdim=True) / (((1 << bits) - 1) / 2)
    return torch.where(scale == 0, torch.full_like(scale, torch.finfo(scale.dtype).eps), scale)


def round_to(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return x rounded to the nearest of the 2^bits multiples of `scale`, symmetric up to the lowest code."""
    half = 1 << (bits - 1)
    return (x / scale).round().clamp(-half, half - 1) * scale


def round_between(x: Tensor, bits: int) -> Tensor:
    """Return x [..., J] rounded to 2^bits levels between the least and the greatest of each token, zero among them."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / ((1 << bits) - 1)).clamp(min=torch.finfo(x.dtype).tiny)
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, (1 << bits) - 1).sub(zero) * scale
