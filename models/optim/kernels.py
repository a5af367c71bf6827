"""The arithmetic of a step on 1-D arrays, each pass over memory as one kernel where torch has one.

torch's optimizers are built on `_fused_adamw_` and `_fused_sgd_`; only their names are private. Per tensor:

    adamw_   m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2         c = 1 - b^step; step = inf: no correction
             x = (1 - lr weight_decay) x - lr (m / c1) / (sqrt(v / c2) + eps)        c1, c2: `corrections`
    sgd_     m = momentum m + (1 - dampening) (g + weight_decay x)          x = x - lr m

`compiled_sums` turns an update rule into one kernel that reads its arrays once and writes sums of squares only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]
Update = Callable[[Tensor, Tensor, Tensors, Tensor], Tensor]
"""From weights, gradient, moments (all of one shape) and a vector of numbers to the update, of that shape."""

DOT = 1 << 16
"""Elements of one float32 sum of squares: its relative error stays near 1e-7, as a dot product keeps many sums."""
ROW = 1024
"""Elements that a compiled kernel sums in float32; rows are added up in float64."""


def corrections(betas: tuple[float, float], step: float) -> tuple[float, float]:
    """Return the two bias corrections (c1, c2) of a tensor's `step`-th update, counted from 1; (1, 1) at infinity."""
    return 1 - betas[0] ** step, 1 - betas[1] ** step


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


def adamw_(
    weights: Tensors,
    gradients: Tensors,
    moments: Sequence[Tensors],
    *,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update weights and both moments in place; equal hyperparameters for all tensors of the lists."""
    torch._fused_adamw_(
        weights,
        gradients,
        moments[0],
        moments[1],
        [],
        [_count(float(step), weights[0].device)] * len(weights),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


@functools.lru_cache(maxsize=64)
def _count(step: float, device: torch.device) -> Tensor:
    """Return a step count as the kernel wants it; kept, because it serves all tensors of a step unchanged."""
    return torch.tensor(step, device=device)


def sgd_(
    weights: Tensors,
    gradients: Tensors,
    momentums: Tensors,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
) -> None:
    """Update weights and momentum in place; equal hyperparameters for all tensors of the lists.

    Momentum 0 has no memory: the weights move by lr (1 - dampening) (g + weight_decay x), and m is left as it is.
    """
    torch._fused_sgd_(
        weights,
        gradients,
        momentums if momentum else [],
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr if momentum else lr * (1 - dampening),
        dampening=dampening,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def squares(vector: Tensor) -> list[Tensor]:
    """Return sums of squares, float32 scalars, of the parts of a vector; infinite where one leaves float32's range."""
    longest = DOT if vector.device.type == "cpu" else 1 << 26
    parts = vector.split(longest) if vector.numel() > longest else (vector,)
    return [torch.dot(part, part) for part in parts]


def whole_rows(length: int) -> int:
    """Return how many elements of a vector go to a kernel of torch.compile; the rest is for `measure`.

    Not one row alone: torch.compile makes a kernel of its own for a size of 1.
    """
    return length - length % ROW if length >= 2 * ROW else 0


@functools.cache
def compiled_sums(update: Update) -> Callable[[Tensor, Tensor, Tensors, Tensor], Tensor]:
    """Return one kernel for all lengths: from the arguments of `update`, 1-D, whole rows, to sums of squares [3].

    The sums, float64, are those of gradient, update and weights.
    """

    def row_sums(weights: Tensor, gradient: Tensor, moments: Tensors, scalars: Tensor) -> Tensor:
        vectors = gradient, update(weights, gradient, moments, scalars), weights
        return torch.stack([vector.view(-1, ROW).square().sum(1) for vector in vectors])

    kernel: Any = torch.compile(row_sums, dynamic=True, fullgraph=True)

    def sums(weights: Tensor, gradient: Tensor, moments: Tensors, scalars: Tensor) -> Tensor:
        result: Tensor = kernel(weights, gradient, moments, scalars).sum(1, dtype=torch.float64)
        return result

    return sums
