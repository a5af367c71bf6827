"""LAMB (You et al. 2020, arXiv:1904.00962 v5, algorithm 2), exact on one rank or sharded over many.

For each tensor x with gradient g, moments m and v starting at 0, and t counting from 1:

    m = b1 m + (1 - b1) g                      v = b2 v + (1 - b2) g^2
    r = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    u = r + weight_decay x
    x = x - lr phi(||x||) / ||u|| u            ||.|| is the L2 norm of the whole tensor
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from models.optim import kernels
from models.optim.fragment_state import Exclude, one_dimensional
from models.optim.kernels import check_adam, corrections
from models.optim.sharded_optimizer import FragmentOptimizer, Span

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "nvlamb": {"eps": 1e-6, "weight_decay": 0.01, "max_grad_norm": 1.0, "exclude": None},
    "apex": {"eps": 1e-6, "weight_decay": 0.01, "max_grad_norm": 1.0, "exclude": None, "adapt": "decayed"},
    "deepspeed": {
        "eps": 1e-8,
        "weight_decay": 0.0,
        "bias_correction": "outside",
        "clamp": (0.01, 10.0),
        "clamp_on": "ratio",
        "exclude": None,
    },
    "addons": {"eps": 1e-6, "weight_decay": 0.0, "exclude": None},
}
"""Keyword arguments that make `Lamb` the algorithm of another implementation; see its docstring."""


def trust_ratio(
    update_norm: float,
    weight_norm: float,
    clamp: tuple[float, float] | None = None,
    clamp_on: Literal["norm", "ratio"] = "norm",
) -> float:
    """Return phi(||x||) / ||u||, or 1 where either norm is zero."""
    if update_norm == 0 or weight_norm == 0:
        return 1.0
    if clamp is None:
        return weight_norm / update_norm
    low, high = clamp
    if clamp_on == "norm":
        return min(max(weight_norm, low), high) / update_norm
    return min(max(weight_norm / update_norm, low), high)


def update(weights: Tensor, gradient: Tensor, moments: kernels.Tensors, scalars: Tensor) -> Tensor:
    """Return u; `scalars` as `Lamb.scalars` gives them."""
    share, keep, square_share, first_gain, second_gain, eps, decay = scalars.unbind()
    first = moments[0] + share * (gradient - moments[0])
    second = keep * moments[1] + square_share * gradient * gradient
    return first * first_gain / ((second * second_gain).sqrt() + eps) + decay * weights


class Lamb(FragmentOptimizer):
    """The paper's LAMB, and by options the other implementations in use.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, inside the norm.
        bias_correction: True as in the paper; False leaves it out; "outside" applies it as a factor of the learning
            rate, sqrt(1 - b2^t) / (1 - b1^t), so that norms and ratio see uncorrected moments.
        clamp: bounds (low, high) of phi; None is the identity.
        clamp_on: whether the bounds apply to the weight norm, as in the paper, or to the ratio.
        exclude: tensors without weight decay; by default those with fewer than two axes (biases, gains of norms).
        adapt: tensors with a trust ratio: those not excluded, "decayed" ones (weight decay above 0), or "all".
        max_grad_norm: clip the gradients' global norm before the moments are formed; None does not.
        compiled: see `FragmentOptimizer`.

    Where the implementations differ (`Lamb(params, lr, **VARIANTS[name])` selects one):

    =================  ==============  ==================  =====================  ======================  ============
    ..                 paper           apex FusedLAMB      NVLAMB (use_nvlamb)    DeepSpeed FusedLamb     TF Addons
    =================  ==============  ==================  =====================  ======================  ============
    eps, decay         1e-6, 0.01      1e-6, 0.01          1e-6, 0.01             1e-8, 0                 1e-6, 0
    global clipping    none            norm 1.0            norm 1.0               off                     none
    bounds             phi on ||x||    none                none                   ratio in [0.01, 10]     none
    a norm is zero     ratio 1         ratio 1             ratio 1                ratio 1                 ratio 1
    not adapted        excluded ones   decay 0             none                   none                    by pattern
    bias correction    in direction    in direction        in direction           outside, in step size   in direction
    =================  ==============  ==================  =====================  ======================  ============

    The paper gives no value for eps and the decay of small models; 1e-6 and 0.01 are those of its BERT code. It does
    not say which tensors are excluded; biases and norms are by general use. TF Addons excludes what its name patterns
    say: pass `exclude=lambda name, shape: ...`. apex can also add the decay to the gradient (`adam_w_mode=False`) and
    leave the factor (1 - b1) out (`grad_averaging=False`); neither is offered here.

    Raises:
        ValueError: for an impossible hyperparameter, naming it.
    """

    moment_names = ("exp_avg", "exp_avg_sq")
    adaptive = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool | Literal["outside"] = True,
        clamp: tuple[float, float] | None = None,
        clamp_on: Literal["norm", "ratio"] = "norm",
        exclude: Exclude | None = one_dimensional,
        adapt: Literal["unexcluded", "decayed", "all"] = "unexcluded",
        max_grad_norm: float | None = None,
        compiled: bool = False,
    ) -> None:
        check_adam(lr, betas, eps)
        if clamp is not None and not 0 <= clamp[0] <= clamp[1]:
            raise ValueError(f"clamp is {clamp}: it must be (low, high) with 0 <= low <= high")
        self.bias_correction = bias_correction
        self.clamp = clamp
        self.clamp_on = clamp_on
        self.adapt = adapt
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, exclude=exclude, max_grad_norm=max_grad_norm, compiled=compiled)

    def adapts(self, name: str, decay: float) -> bool:
        """Tell whether a tensor's update is scaled by its trust ratio."""
        return {"all": True, "decayed": decay > 0, "unexcluded": name not in self._excluded}[self.adapt]

    rule = "lamb"
    update = staticmethod(update)

    def scalars(self, span: Span) -> list[float]:
        """Return (1 - b1, b2, 1 - b2, 1 / c1, 1 / c2, eps, weight decay); 1 - b2 of a rounded b2 would be 1e-5 off."""
        betas = span.group["betas"]
        first, second = corrections(betas, self._count(span))
        return [1 - betas[0], betas[1], 1 - betas[1], 1 / first, 1 / second, span.group["eps"], span.decay]

    def measure(self, span: Span, scratch: Tensor) -> Tensor:
        """Return u, by a fused step of Adam on copies: from weight_decay x at a learning rate of -1."""
        first, second, moved = scratch.unbind()
        torch.stack(span.moments, out=scratch[:2])
        torch.mul(span.weights, span.decay, out=moved)
        self._adam_([span], [moved], ([first], [second]), lr=-1.0, decay=0.0)
        return moved

    def ratio(self, under: float, over: float, group: Mapping[str, Any], decay: float) -> float:  # noqa: ARG002
        """Return phi(||x||) / ||u||."""
        return trust_ratio(under, over, self.clamp, self.clamp_on)

    def apply(self, spans: list[Span], ratio: float) -> None:
        """Update m, v and x in place: AdamW's step at the learning rate lr phi(||x||) / ||u||."""
        moments = [[span.moments[number] for span in spans] for number in range(2)]
        weights = [span.weights for span in spans]
        self._adam_(spans, weights, moments, lr=self._rate(spans[0], ratio), decay=spans[0].decay)

    def step_scalars(self, span: Span, ratio: float) -> list[float]:
        """Return `scalars` and the rate lr phi(||x||) / ||u||."""
        return [*self.scalars(span), self._rate(span, ratio)]

    def _rate(self, span: Span, ratio: float) -> float:
        rate: float = span.group["lr"] * ratio
        if self.bias_correction != "outside":
            return rate
        first, second = corrections(span.group["betas"], span.step)
        return rate * math.sqrt(second) / first

    def _count(self, span: Span) -> float:
        """Return the step that the direction is corrected for: infinite for no correction."""
        return span.step if self.bias_correction is True else math.inf

    def _adam_(
        self, spans: list[Span], weights: list[Tensor], moments: Sequence[list[Tensor]], *, lr: float, decay: float
    ) -> None:
        group = spans[0].group
        kernels.adamw_(
            weights,
            [span.gradient for span in spans],
            moments,
            step=self._count(spans[0]),
            lr=lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=decay,
        )
