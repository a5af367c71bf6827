"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) on fragments, so that LISA and resuming work under any ZeRO stage.

x = x - lr weight_decay x
x = x - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)        m and v as in Adam
"""

from __future__ import annotations

from typing import Any

from models.optim import kernels
from models.optim.fragment_state import Exclude, one_dimensional
from models.optim.kernels import check_adam
from models.optim.sharded_optimizer import FragmentOptimizer, Span


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

    def apply(self, spans: list[Span], ratio: float) -> None:  # noqa: ARG002 - only adaptive rules have ratios
        """Update m, v and x in place."""
        group = spans[0].group
        kernels.adamw_(
            [span.weights for span in spans],
            [span.gradient for span in spans],
            [[span.moments[number] for span in spans] for number in range(2)],
            step=spans[0].step,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=spans[0].decay,
        )
