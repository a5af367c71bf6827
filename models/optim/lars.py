"""LARS, as LAMB's paper analyses it (arXiv:1904.00962 v5, algorithm 1) or as first published (arXiv:1708.03888).

paper:     m = b m + (1 - b) (g + weight_decay x)           x = x - lr phi(||x||) / ||m|| m
original:  m = b m + lr q (g + weight_decay x)              x = x - m
           q = trust_coefficient ||x|| / (||g|| + weight_decay ||x||)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from models.optim import foreach
from models.optim.fragments import Batch, FragmentOptimizer
from models.optim.lamb import trust_ratio
from models.optim.state import Exclude, one_dimensional


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
        super().__init__(params, defaults, exclude=exclude, max_grad_norm=max_grad_norm)

    def measure(self, batch: Batch, gradients: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the new momentum (or, for "original", the gradient) and the weights."""
        if self.form == "original":
            return gradients, batch.weights
        return list(
            foreach.lerp(batch.moments[0], _decayed(batch, gradients), 1 - batch.group["momentum"])
        ), batch.weights

    def ratio(self, under: float, over: float, group: Mapping[str, Any], decay: float) -> float:  # noqa: ARG002
        """Return phi(||x||) / ||m||, or the original's q."""
        if self.form == "paper":
            return trust_ratio(under, over, self.clamp)
        return self.trust_coefficient * over / (under + decay * over) if under and over else 1.0

    def apply(self, batch: Batch, gradients: list[Tensor], ratios: list[float]) -> None:
        """Update m and x in place."""
        (momentum,), rate = batch.moments, batch.group["lr"]
        scales = [rate * ratio for ratio in ratios]
        if self.form == "paper":
            foreach.lerp_(momentum, _decayed(batch, gradients), 1 - batch.group["momentum"])
            foreach.add_(batch.weights, foreach.mul(momentum, [-scale for scale in scales]))
        else:
            foreach.mul_(momentum, batch.group["momentum"])
            foreach.add_(momentum, foreach.mul(_decayed(batch, gradients), scales))
            foreach.add_(batch.weights, momentum, alpha=-1)


def _decayed(batch: Batch, gradients: list[Tensor]) -> list[Tensor]:
    return list(foreach.add(gradients, batch.weights, alpha=batch.decay)) if batch.decay else gradients
