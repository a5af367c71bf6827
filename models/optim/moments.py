"""Adam's exponential averages and the direction they give; pure functions over lists of tensors.

m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
direction = (m / c1) / (sqrt(v / c2) + eps)    with c1 = 1 - b1^t, c2 = 1 - b2^t, or 1 without bias correction
"""

from __future__ import annotations

import math

from torch import Tensor

from models.optim import foreach

Tensors = list[Tensor]


def averages(
    first: Tensors, second: Tensors, gradients: Tensors, betas: tuple[float, float]
) -> tuple[Tensors, Tensors]:
    """Return the new averages (m, v) and leave the old ones alone."""
    new_second = list(foreach.mul(second, betas[1]))
    foreach.addcmul_(new_second, gradients, gradients, 1 - betas[1])
    return list(foreach.lerp(first, gradients, 1 - betas[0])), new_second


def average_(first: Tensors, second: Tensors, gradients: Tensors, betas: tuple[float, float]) -> None:
    """Update the averages in place; the same numbers as `averages`."""
    foreach.lerp_(first, gradients, 1 - betas[0])
    foreach.mul_(second, betas[1])
    foreach.addcmul_(second, gradients, gradients, 1 - betas[1])


def corrections(betas: tuple[float, float], step: int) -> tuple[float, float]:
    """Return the two bias corrections (c1, c2) of a tensor's `step`-th update, counted from 1."""
    return 1 - betas[0] ** step, 1 - betas[1] ** step


def direction(first: Tensors, second: Tensors, correction: tuple[float, float], eps: float) -> Tensors:
    """Return Adam's direction, shapes as `first`; new tensors."""
    roots = list(foreach.sqrt(second))
    foreach.mul_(roots, correction[0] / math.sqrt(correction[1]))
    foreach.add_(roots, correction[0] * eps)
    return list(foreach.div(first, roots))


def check_adam(lr: float, betas: tuple[float, float], eps: float) -> None:
    """Refuse impossible hyperparameters.

    Raises:
        ValueError: naming the value and its range.
    """
    if not lr >= 0:
        raise ValueError(f"lr is {lr}: it must not be negative")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}: it must not be negative")
    for beta in betas:
        if not 0 <= beta < 1:
            raise ValueError(f"betas are {betas}: each must be at least 0 and below 1")
