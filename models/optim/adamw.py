"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) on fragments, so that LISA and resuming work under any ZeRO stage.

x = x - lr weight_decay x
x = x - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)        m and v as in Adam
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from models.optim import foreach
from models.optim.fragments import Batch, FragmentOptimizer
from models.optim.moments import average_, check_adam, corrections
from models.optim.state import Exclude, one_dimensional


class AdamW(FragmentOptimizer):
    """AdamW with the arithmetic of `torch.optim.AdamW`.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        exclude: tensors without weight decay; by default those with fewer than two axes (torch's AdamW decays all:
            pass None for that).
        max_grad_norm: clip the gradients' global norm; None does not.

    Raises:
        ValueError: for an impossible hyperparameter, naming it.
    """

    moment_names = ("exp_avg", "exp_avg_sq")
    adaptive = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        exclude: Exclude | None = one_dimensional,
        max_grad_norm: float | None = None,
    ) -> None:
        check_adam(lr, betas, eps)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, exclude=exclude, max_grad_norm=max_grad_norm)

    def apply(self, batch: Batch, gradients: list[Tensor], ratios: list[float]) -> None:  # noqa: ARG002
        """Update m, v and x in place."""
        group = batch.group
        first_correction, second_correction = corrections(group["betas"], batch.step)
        if batch.decay:
            foreach.mul_(batch.weights, 1 - group["lr"] * batch.decay)
        average_(batch.moments[0], batch.moments[1], gradients, group["betas"])
        roots = list(foreach.sqrt(batch.moments[1]))
        foreach.mul_(roots, 1 / math.sqrt(second_correction))
        foreach.add_(roots, group["eps"])
        foreach.addcdiv_(batch.weights, batch.moments[0], roots, -group["lr"] / first_correction)
