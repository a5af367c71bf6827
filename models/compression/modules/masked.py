"""A linear layer whose zeros stay zero while it trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class MaskedLinear(nn.Module):
    """A linear layer that computes with the weights that were not zero when it was made.

    The mask is applied in the forward pass, so the gradient of a masked weight is exactly zero on every engine: nothing
    moves it, neither moments nor decay nor a trust ratio, for all of them are multiples of the gradient or the weight.

    Args:
        linear: the layer to take the place of; the mask follows from its weight, and is not saved.
    """

    keep_OI: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.register_buffer("keep_OI", self.weight.detach() != 0, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [..., I]."""
        return functional.linear(x, torch.where(self.keep_OI, self.weight, 0.0), self.bias)
