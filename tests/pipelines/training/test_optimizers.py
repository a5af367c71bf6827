"""From settings to the optimizer and its rate: every option arrives, and LISA's groups are one a layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from models.optim.adamw import AdamW
from models.optim.lamb import VARIANTS, Lamb
from models.optim.lars import Lars
from pipelines.training.config import PretrainConfig
from pipelines.training.optimizer_config import OptimizerConfig
from pipelines.training.optimizers import learning_rate, make_optimizer

NAMES = ("embed.weight", "layers.0.w.weight", "layers.0.norm.weight", "layers.1.w.weight", "norm.weight")


def parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (name, nn.Parameter(torch.randn((3,) if "norm" in name else (4, 3), generator=generator))) for name in NAMES
    ]


def config_of(tiny: dict[str, Any], **changes: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({**tiny, **changes})


@pytest.mark.parametrize(("name", "kind"), [("lamb", Lamb), ("lars", Lars), ("adamw", AdamW)])
def test_every_option_of_the_settings_reaches_the_optimizer(
    name: str, kind: type, tiny_settings: dict[str, Any]
) -> None:
    own = {"betas": [0.8, OptimizerConfig().betas[1]]} if name == "lars" else {"betas": [0.8, 0.9], "eps": 1e-4}
    options = {"name": name, "lr": 0.02, "weight_decay": 0.07, "clip": 0.25, **own}
    made = make_optimizer(config_of(tiny_settings, optimizer=options), parameters())
    assert type(made) is kind
    assert made.max_grad_norm == 0.25
    (group,) = made.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.07)
    if name == "lars":
        assert group["momentum"] == 0.8
    else:
        assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.9), 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_lamb_steps_as_the_optimizer_of_that_name_does(
    variant: str, tiny_settings: dict[str, Any]
) -> None:
    options = {"name": "lamb", "lr": 0.05, "weight_decay": 0.02, "clip": 0.25, "variant": variant}
    config = config_of(tiny_settings, optimizer=options)
    rules = VARIANTS[variant] | {"weight_decay": 0.02, "max_grad_norm": 0.25, "betas": config.optimizer.betas}
    ends = []
    for make in (lambda pairs: make_optimizer(config, pairs), lambda pairs: Lamb(pairs, lr=0.05, **rules)):
        pairs = parameters()
        made = make(pairs)
        for _ in range(3):
            for _, parameter in pairs:
                parameter.grad = parameter.detach().sin()
            made.step()
        ends.append([parameter.detach().clone() for _, parameter in pairs])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_an_eps_that_is_set_counts_under_every_variant(tiny_settings: dict[str, Any]) -> None:
    for given, expected in ((None, 1e-8), (1e-4, 1e-4)):
        config = config_of(tiny_settings, optimizer={"name": "lamb", "variant": "deepspeed", "eps": given})
        assert make_optimizer(config, parameters()).param_groups[0]["eps"] == expected


def test_with_lisa_each_layer_is_a_group_and_without_it_all_are_one(tiny_settings: dict[str, Any]) -> None:
    plain = make_optimizer(config_of(tiny_settings), parameters())
    grouped = make_optimizer(config_of(tiny_settings, lisa={"enabled": True, "layers": 1, "interval": 2}), parameters())
    assert [group["param_names"] for group in plain.param_groups] == [list(NAMES)]
    assert [group["param_names"] for group in grouped.param_groups] == [
        ["embed.weight", "norm.weight"],
        ["layers.0.w.weight", "layers.0.norm.weight"],
        ["layers.1.w.weight"],
    ]


def test_groups_change_no_number_of_a_step(tiny_settings: dict[str, Any]) -> None:
    """One layer more or less in a group: the ratios belong to tensors, and clipping to all of them together."""
    ends = []
    for changes in ({}, {"lisa": {"enabled": True, "layers": 1, "interval": 2}}):
        pairs = parameters()
        made = make_optimizer(config_of(tiny_settings, **changes), pairs)
        for _ in range(3):
            for _, parameter in pairs:
                parameter.grad = parameter.detach().sin()
            made.step()
        ends.append([parameter.detach().clone() for _, parameter in pairs])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_the_rate_follows_the_phase_that_a_step_lies_in(tiny_settings: dict[str, Any]) -> None:
    """A linear warm-up of 2 steps in the first phase and of 1 in the second, which warms up again."""
    warm = [{"steps": 4, "schedule": {"warmup": 2}}, {"steps": 2, "schedule": {"warmup": 1}}]
    first = {"batch_size": 8}
    config = config_of(tiny_settings, phases=[{**phase, **first} for phase in warm], schedule={}, optimizer={"lr": 0.4})
    rates = [learning_rate(config, step) for step in range(6)]
    assert rates[1] == pytest.approx(2 * rates[0])
    assert max(rates) == pytest.approx(0.4)
    assert rates[3] < rates[2]
    assert rates[4] > rates[3]
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates)
