"""Linear layers that compute with the quantized form of a full-precision weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

_SMALLEST = 1e-12


class QuantizedLinear(nn.Module):
    """A linear layer with a learned scale for each row of its weight.

    The scale is learned as a gain over its start. A gain moves around one, as the gains of norms do, so that one
    learning rate fits both, whatever the size of the weights.

    Args:
        linear: the layer to take the place of.
        start_O: scale of each row to begin with; must follow from the weight, for it is not saved.
        quantize: (weight [O, I], scale [O]) -> quantized weight [O, I], with the gradients to train by.
    """

    start_O: Tensor

    def __init__(self, linear: nn.Linear, start_O: Tensor, quantize: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.gain = nn.Parameter(torch.ones_like(start_O))
        self.register_buffer("start_O", start_O.detach().clone(), persistent=False)
        self._quantize = quantize

    def scale(self) -> Tensor:
        """Return the scale of each row [O], positive."""
        return (self.start_O * self.gain).abs().clamp(min=_SMALLEST)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the quantized weight to x [..., I]."""
        return functional.linear(x, self._quantize(self.weight, self.scale()), self.bias)


class FunctionalLinear(nn.Module):
    """A linear layer that computes with functions of its input and of its weight (BitNet).

    Args:
        linear: the layer to take the place of.
        inputs: x [..., I] -> what is multiplied.
        weight: weight [O, I] -> what it is multiplied with.
    """

    def __init__(
        self, linear: nn.Linear, inputs: Callable[[Tensor], Tensor], weight: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self._inputs, self._quantize = inputs, weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [..., I]."""
        return functional.linear(self._inputs(x), self._quantize(self.weight), self.bias)
