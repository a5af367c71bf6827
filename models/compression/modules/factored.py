"""A linear layer whose weight is a product of two narrow matrices, cut to any rank while it computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class FactoredLinear(nn.Module):
    """y = left (right x), with R components in the order of their importance.

    Args:
        linear: the layer to take the place of.
        left_OR: its left factor.
        right_RI: its right factor.
    """

    def __init__(self, linear: nn.Linear, left_OR: Tensor, right_RI: Tensor) -> None:
        super().__init__()
        self.left_OR = nn.Parameter(left_OR.detach().clone(memory_format=torch.contiguous_format))
        self.right_RI = nn.Parameter(right_RI.detach().clone(memory_format=torch.contiguous_format))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.rank: int | None = None
        """Components that take part; None: all."""
        self.penalized = False
        """Whether the forward pass computes `penalty`."""
        self.penalty: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the product to x [..., I]."""
        if self.penalized:
            # Here, and not where it is added up: under ZeRO-3 a layer has its weights during its own forward pass only.
            self.penalty = tail_norms(self.left_OR.T) + tail_norms(self.right_RI)
        narrow = functional.linear(x, self.right_RI[: self.rank])
        return functional.linear(narrow, self.left_OR[:, : self.rank], self.bias)


def tail_norms(factor_RN: Tensor) -> Tensor:
    """Return the sum over b of the norm of rows b, b + 1, ...: the hierarchical group lasso, which orders the rows."""
    energy_R = factor_RN.float().square().sum(1)
    tails_R = energy_R.flip(0).cumsum(0)
    return (tails_R + 1e-12).sqrt().sum()
