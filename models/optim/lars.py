"""LARS, as LAMB's paper analyses it (arXiv:1904.00962 v5, algorithm 1) or as first published (arXiv:1708.03888).

paper:     m = b m + (1 - b) (g + weight_decay x)           x = x - lr phi(||x||) / ||m|| m
original:  m = b m + lr q (g + weight_decay x)              x = x - m
           q = trust_coefficient ||x|| / (||g|| + weight_decay ||x||)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from models.optim import kernels
from models.optim.fragment_state import Exclude, one_dimensional
from models.optim.lamb import trust_ratio
from models.optim.sharded_optimizer import FragmentOptimizer, Span


def update(weights: Tensor, gradient: Tensor, moments: kernels.Tensors, scalars: Tensor) -> Tensor:
    """Return the new momentum, or the gradient; `scalars` as `Lars.scalars` gives them."""
    keep, share, decay = scalars.unbind()
    return keep * moments[0] + share * (gradient + decay * weights)


class Lars(FragmentOptimizer):
    """Layer-wise adaptive rate scaling for SGD with momentum.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either.
        lr: learning rate.
        momentum: b above, at least 0 and below 1.
        weight_decay: added to the gradient.
        form: "paper" (LAMB's paper) or "original".
        clamp: bounds (low, high) of phi on the weight norm, for "paper"; None is the identity.
        trust_coefficient: the factor of "original"; its authors use 0.001.
        exclude: tensors without weight decay and without adaptation; by default those with fewer than two axes.
        max_grad_norm: clip the gradients' global norm; None does not.
        compiled: see `FragmentOptimizer`.

    A tensor with a zero norm gets ratio 1, as does (form "original": with plain momentum SGD) an excluded one.

    Raises:
        ValueError: for an impossible hyperparameter, naming it.
    """

    moment_names = ("momentum",)
    adaptive = True

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        *,
        form: Literal["paper", "original"] = "paper",
        clamp: tuple[float, float] | None = None,
        trust_coefficient: float = 0.001,
        exclude: Exclude | None = one_dimensional,
        max_grad_norm: float | None = None,
        compiled: bool = False,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}: it must be at least 0 and below 1")
        if form not in ("paper", "original"):
            raise ValueError(f'form is {form!r}: it must be "paper" or "original"')
        if clamp is not None and not 0 <= clamp[0] <= clamp[1]:
            raise ValueError(f"clamp is {clamp}: it must be (low, high) with 0 <= low <= high")
        self.form = form
        self.clamp = clamp
        self.trust_coefficient = trust_coefficient
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults, exclude=exclude, max_grad_norm=max_grad_norm, compiled=compiled)

    rule = "lars"
    update = staticmethod(update)

    def scalars(self, span: Span) -> list[float]:
        """Return (b, 1 - b, weight decay) for the new momentum; (0, 1, 0) for the gradient of the original form."""
        momentum = span.group["momentum"]
        return [momentum, 1 - momentum, span.decay] if self.form == "paper" else [0.0, 1.0, 0.0]

    def measure(self, span: Span, scratch: Tensor) -> Tensor:
        """Return the new momentum, or for "original" the gradient."""
        if self.form == "original":
            return span.gradient
        result = scratch[0]
        torch.add(span.gradient, span.weights, alpha=span.decay, out=result)
        return torch.lerp(span.moments[0], result, 1 - span.group["momentum"], out=result)

    def ratio(self, under: float, over: float, group: Mapping[str, Any], decay: float) -> float:  # noqa: ARG002
        """Return phi(||x||) / ||m||, or the original's q."""
        if self.form == "paper":
            return trust_ratio(under, over, self.clamp)
        return self.trust_coefficient * over / (under + decay * over) if under and over else 1.0

    def step_scalars(self, span: Span, ratio: float) -> list[float]:
        """Return (b, share of what comes in, weight decay, rate): the original form has the rate inside m."""
        momentum, rate = span.group["momentum"], span.group["lr"] * ratio
        paper = self.form == "paper"
        return [momentum, 1 - momentum if paper else rate, span.decay, rate if paper else 1.0]

    def apply(self, spans: list[Span], ratio: float) -> None:
        """Update m and x in place, by a fused step of SGD."""
        momentum, rate = spans[0].group["momentum"], spans[0].group["lr"] * ratio
        paper = self.form == "paper"
        kernels.sgd_(
            [span.weights for span in spans],
            [span.gradient for span in spans],
            [span.moments[0] for span in spans],
            lr=rate if paper else 1.0,
            momentum=momentum,
            dampening=momentum if paper else 1 - rate,
            weight_decay=spans[0].decay,
        )
