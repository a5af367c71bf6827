"""A linear layer with a few frozen 8-bit weights, all others on two values that follow what trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.compression.pb_llm import MixedPacked


class PartlyBinaryLinear(nn.Module):
    """A linear layer that trains the weights behind its signs.

    Args:
        linear: the layer to take the place of.
        start: what its weight became; must follow from the weight, for mask and 8-bit codes are not saved.
        quantize: (weight, mask of the frozen, what they are; all [O, I]) -> quantized weight, with gradients.
    """

    salient_OI: Tensor
    frozen_OI: Tensor

    def __init__(
        self, linear: nn.Linear, start: MixedPacked, quantize: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.start = start
        self.register_buffer("salient_OI", start.salient_OI, persistent=False)
        self.register_buffer("frozen_OI", torch.where(start.salient_OI, start.dequantize(), 0.0), persistent=False)
        self._quantize = quantize

    def forward(self, x: Tensor) -> Tensor:
        """Apply the quantized weight to x [..., I]."""
        return functional.linear(x, self._quantize(self.weight, self.salient_OI, self.frozen_OI), self.bias)
