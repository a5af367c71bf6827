"""LARS in both published forms against float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.optim.lars import Lars

SHAPES = {"weight": (7, 5), "bias": (5,)}


def paper(x: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float, *, adapt: bool) -> np.ndarray:
    """Algorithm 1 of arXiv:1904.00962 v5."""
    m = np.zeros_like(x)
    for g in gradients:
        m = 0.9 * m + 0.1 * (g + decay * x)
        x = x - lr * (np.linalg.norm(x) / np.linalg.norm(m) if adapt else 1.0) * m
    return x


def original(x: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float, *, adapt: bool) -> np.ndarray:
    """Algorithm 1 of arXiv:1708.03888."""
    v = np.zeros_like(x)
    for g in gradients:
        size = np.linalg.norm(x)
        local = 0.001 * size / (np.linalg.norm(g) + decay * size) if adapt else 1.0
        v = 0.9 * v + lr * local * (g + decay * x)
        x = x - v
    return x


@pytest.mark.parametrize(("form", "statement", "lr"), [("paper", paper, 0.02), ("original", original, 0.5)])
def test_30_steps_follow_the_published_algorithm(form: Any, statement: Any, lr: float, named: Any, fill: Any) -> None:
    parameters = named(dtype=torch.float64, **SHAPES)
    start = {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}
    optimizer = Lars(parameters.items(), lr=lr, momentum=0.9, weight_decay=0.1, form=form)
    gradients: dict[str, list[np.ndarray]] = {name: [] for name in parameters}
    for step in range(30):
        for name, gradient in fill(parameters, step).items():
            gradients[name].append(gradient.numpy())
        optimizer.step()
    for name, parameter in parameters.items():
        vector = parameter.ndim < 2
        expected = statement(start[name], gradients[name], lr, 0.0 if vector else 0.1, adapt=not vector)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=0, atol=1e-10)


def test_a_tensor_of_zeros_moves_with_ratio_one(named: Any, fill: Any) -> None:
    parameters = named(weight=(4, 4))
    parameters["weight"].data.zero_()
    optimizer = Lars(parameters.items(), lr=0.1, momentum=0.0)
    gradient = fill(parameters, 0)["weight"]
    optimizer.step()
    assert optimizer.trust_ratios() == {"weight": 1.0}
    torch.testing.assert_close(parameters["weight"].detach(), -0.1 * gradient)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"momentum": 1.0}, "momentum is 1"), ({"form": "other"}, "form is 'other'"), ({"clamp": (3.0, 1.0)}, "clamp is")],
)
def test_impossible_hyperparameters_are_refused(options: dict[str, Any], message: str, named: Any) -> None:
    with pytest.raises(ValueError, match=message):
        Lars(named(weight=(2, 2)).items(), **options)
