"""LAMB against its paper in float64 numpy, its two properties, and the other implementations it can be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from models.optim.lamb import VARIANTS, Lamb, trust_ratio

SHAPES = {"weight": (7, 5), "other": (3, 4), "bias": (5,)}


def paper(
    x: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float, *, adapt: bool = True, **options: Any
) -> np.ndarray:
    """Algorithm 2 of arXiv:1904.00962 v5 in float64, with the deviations of other implementations."""
    b1, b2, eps = 0.9, 0.999, options.get("eps", 1e-6)
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        correction = options.get("bias_correction", True)
        c1, c2 = (1 - b1**t, 1 - b2**t) if correction is True else (1.0, 1.0)
        u = (m / c1) / (np.sqrt(v / c2) + eps) + decay * x
        size, update = np.linalg.norm(x), np.linalg.norm(u)
        low, high = options.get("clamp") or (0, math.inf)
        if options.get("clamp_on", "norm") == "norm":
            ratio = np.clip(size, low, high) / update
        else:
            ratio = np.clip(size / update, low, high)
        rate = lr * math.sqrt(1 - b2**t) / (1 - b1**t) if correction == "outside" else lr
        x = x - rate * (ratio if adapt else 1.0) * u
    return x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias_correction": False},
        {"bias_correction": "outside"},
        {"clamp": (0.5, 2.0)},
        {"clamp": (0.01, 0.3), "clamp_on": "ratio"},
    ],
)
def test_50_steps_follow_the_papers_algorithm(options: dict[str, Any], named: Any, fill: Any) -> None:
    parameters = named(dtype=torch.float64, **SHAPES)
    start = {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}
    optimizer = Lamb(parameters.items(), lr=0.02, weight_decay=0.1, **options)
    gradients: dict[str, list[np.ndarray]] = {name: [] for name in parameters}
    for step in range(50):
        for name, gradient in fill(parameters, step).items():
            gradients[name].append(gradient.numpy())
        optimizer.step()
    for name, parameter in parameters.items():
        vector = parameter.ndim < 2
        expected = paper(start[name], gradients[name], 0.02, 0.0 if vector else 0.1, adapt=not vector, **options)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=0, atol=1e-10)


def test_float32_stays_within_1e_6_of_float64(named: Any, fill: Any) -> None:
    finals = []
    for dtype in (torch.float32, torch.float64):
        parameters = named(dtype=dtype, **SHAPES)
        optimizer = Lamb(parameters.items(), lr=0.02, weight_decay=0.1)
        for step in range(20):
            fill(parameters, step)
            optimizer.step()
        finals.append(torch.cat([parameter.detach().double().flatten() for parameter in parameters.values()]))
    assert (finals[0] - finals[1]).abs().max() < 1e-6


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (300, 500)])
def test_one_step_moves_an_adapted_tensor_by_lr_times_its_norm(size: tuple[int, int], named: Any, fill: Any) -> None:
    parameters = named(weight=size)
    before = parameters["weight"].detach().clone()
    optimizer = Lamb(parameters.items(), lr=0.03, weight_decay=0.1)
    fill(parameters, 0)
    optimizer.step()
    moved = (parameters["weight"].detach() - before).double().norm() / before.double().norm()
    assert float(moved) == pytest.approx(0.03, rel=2e-6)


def test_scaling_the_loss_by_1000_leaves_the_update_unchanged(named: Any, fill: Any) -> None:
    finals = []
    for scale in (1.0, 1000.0):
        parameters = named(**SHAPES)
        optimizer = Lamb(parameters.items(), lr=0.02, weight_decay=0.1, eps=1e-15)
        for step in range(5):
            fill(parameters, step, scale)
            optimizer.step()
        finals.append(torch.cat([parameter.detach().flatten() for parameter in parameters.values()]))
    assert (finals[0] - finals[1]).abs().max() < 1e-6


def test_vectors_are_neither_decayed_nor_adapted_by_default(named: Any, fill: Any) -> None:
    parameters = named(**SHAPES)
    optimizer = Lamb(parameters.items(), lr=0.02, weight_decay=0.1)
    fill(parameters, 0)
    optimizer.step()
    assert set(optimizer.trust_ratios()) == {"weight", "other"}


@pytest.mark.parametrize(("adapt", "adapted"), [("all", {"a", "b"}), ("decayed", {"b"}), ("unexcluded", {"a", "b"})])
def test_adapt_chooses_which_tensors_have_a_trust_ratio(adapt: Any, adapted: set[str], named: Any, fill: Any) -> None:
    parameters = named(a=(4, 4), b=(4, 4))
    groups = [{"params": [("a", parameters["a"])], "weight_decay": 0.0}, {"params": [("b", parameters["b"])]}]
    optimizer = Lamb(groups, lr=0.02, weight_decay=0.1, adapt=adapt)
    fill(parameters, 0)
    optimizer.step()
    assert set(optimizer.trust_ratios()) == adapted


def test_exclude_by_name_keeps_a_tensor_from_decay_and_adaptation(named: Any, fill: Any) -> None:
    parameters = named(**SHAPES)
    optimizer = Lamb(parameters.items(), exclude=lambda name, _shape: name == "other")
    fill(parameters, 0)
    optimizer.step()
    assert set(optimizer.trust_ratios()) == {"weight", "bias"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains(variant: str, named: Any) -> None:
    parameters = named(weight=(6, 6), bias=(6,))
    target = named(seed=1, weight=(6, 6), bias=(6,))
    optimizer = Lamb(parameters.items(), lr=0.05, **VARIANTS[variant])
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = sum((parameters[name] - target[name].detach()).square().sum() for name in parameters)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_the_deepspeed_variant_differs_from_the_paper_where_it_says(named: Any, fill: Any) -> None:
    parameters = named(**SHAPES)
    start = parameters["bias"].detach().double().numpy().copy()
    optimizer = Lamb(parameters.items(), lr=0.02, **VARIANTS["deepspeed"])
    gradients = []
    for step in range(10):
        gradients.append(fill(parameters, step)["bias"].double().numpy())
        optimizer.step()
    options = {"bias_correction": "outside", "clamp": (0.01, 10.0), "clamp_on": "ratio", "eps": 1e-8}
    expected = paper(start, gradients, 0.02, 0.0, **options)
    np.testing.assert_allclose(parameters["bias"].detach().numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("update", "weight", "clamp", "on", "expected"),
    [
        (2.0, 6.0, None, "norm", 3.0),
        (0.0, 6.0, None, "norm", 1.0),
        (2.0, 0.0, None, "norm", 1.0),
        (2.0, 6.0, (0.0, 5.0), "norm", 2.5),
        (2.0, 60.0, (0.01, 10.0), "ratio", 10.0),
        (2.0, 1e-9, (0.01, 10.0), "ratio", 0.01),
    ],
)
def test_trust_ratio(update: float, weight: float, clamp: Any, on: Any, expected: float) -> None:
    assert trust_ratio(update, weight, clamp, on) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ({"eps": -1e-8}, "eps is"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"clamp": (2.0, 1.0)}, "clamp is"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0"),
    ],
)
def test_impossible_hyperparameters_are_refused(options: dict[str, Any], message: str, named: Any) -> None:
    with pytest.raises(ValueError, match=message):
        Lamb(named(weight=(2, 2)).items(), **options)


@pytest.mark.parametrize(
    ("variant", "eps", "decay", "clip", "adapted"),
    [
        ("nvlamb", 1e-6, 0.01, 1.0, {"weight", "other", "bias"}),
        ("apex", 1e-6, 0.01, 1.0, {"weight", "other"}),
        ("addons", 1e-6, 0.0, math.inf, {"weight", "other", "bias"}),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_variant_is_its_implementation_stated_in_float64(
    variant: str, eps: float, decay: float, clip: float, adapted: set[str], compiled: bool, named: Any, fill: Any
) -> None:
    """Apex adapts what decays: the bias is in a group without decay here, which NVLAMB adapts all the same."""
    parameters = named(**SHAPES)
    start = {name: parameter.detach().double().numpy().copy() for name, parameter in parameters.items()}
    options = dict(VARIANTS[variant])
    share = options.pop("weight_decay")
    groups = [
        {"params": [(name, parameters[name]) for name in ("weight", "other")], "weight_decay": share},
        {"params": [("bias", parameters["bias"])], "weight_decay": 0.0},
    ]
    optimizer = Lamb(groups, lr=0.02, compiled=compiled, **options)
    gradients: dict[str, list[np.ndarray]] = {name: [] for name in SHAPES}
    for step in range(15):
        given = {name: gradient.double().numpy() for name, gradient in fill(parameters, step).items()}
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in given.values()))
        for name, gradient in given.items():
            gradients[name].append(gradient / max(1.0, norm / clip))
        optimizer.step()
    assert set(optimizer.trust_ratios()) == adapted
    for name, parameter in parameters.items():
        rate = 0.0 if name == "bias" else decay
        expected = paper(start[name], gradients[name], 0.02, rate, adapt=name in adapted, eps=eps)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=0, atol=1e-5)
