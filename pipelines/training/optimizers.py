"""From the configuration to the update rule and its learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from models.optim import lisa
from models.optim.adamw import AdamW
from models.optim.lamb import VARIANTS, Lamb
from models.optim.lars import Lars
from models.optim.sharded_optimizer import FragmentOptimizer
from pipelines.training import phases
from pipelines.training.config import PretrainConfig


def make_optimizer(config: PretrainConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> FragmentOptimizer:
    """Return the configured optimizer over named parameters.

    With LISA each layer is a group of its own: ZeRO 1 and 2 cut group by group, so every rank holds its share of every
    layer, and the memory that frozen layers give back is given back on every rank.
    """
    chosen = config.optimizer
    params: Any = lisa.layer_groups(parameters) if config.lisa.enabled else list(parameters)
    common: dict[str, Any] = {
        "lr": chosen.peak_lr,
        "weight_decay": chosen.weight_decay,
        "max_grad_norm": chosen.clip,
    }
    if chosen.name == "lars":
        return Lars(params, momentum=chosen.betas[0], clamp=chosen.clamp, compiled=chosen.compiled, **common)
    common |= {"betas": chosen.betas, "eps": chosen.epsilon}
    if chosen.name == "adamw":
        return AdamW(params, **common)
    rules: dict[str, Any] = {
        "bias_correction": chosen.bias_correction,
        "clamp": chosen.clamp,
        **VARIANTS[chosen.variant],
    }
    own = {"weight_decay", "max_grad_norm"} | ({"eps"} if chosen.eps is not None else set())
    rules = {name: value for name, value in rules.items() if name not in own}
    return Lamb(params, compiled=chosen.compiled, **(common | rules))


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Return the learning rate of a step; steps count from 0."""
    phase = phases.at(phases.phases_of(config), step)
    return phase.learning_rate(step - phase.first)
