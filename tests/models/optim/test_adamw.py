"""AdamW against torch's own."""

from __future__ import annotations

from typing import Any

import torch

from models.optim.adamw import AdamW

SHAPES = {"weight": (37, 23), "other": (5, 4), "bias": (5,)}


def test_50_steps_equal_torchs_adamw(named: Any, fill: Any) -> None:
    ours, theirs = named(**SHAPES), named(**SHAPES)
    one = AdamW(ours.items(), lr=1e-2, weight_decay=0.1, exclude=None)
    other = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.1)
    for step in range(50):
        for parameters, optimizer in ((ours, one), (theirs, other)):
            fill(parameters, step)
            optimizer.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


def test_clipping_equals_torchs_clip_grad_norm(named: Any, fill: Any) -> None:
    ours, theirs = named(**SHAPES), named(**SHAPES)
    one = AdamW(ours.items(), lr=1e-2, exclude=None, max_grad_norm=0.5)
    other = torch.optim.AdamW(theirs.values(), lr=1e-2)
    for step in range(10):
        fill(ours, step)
        one.step()
        fill(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        other.step()
        assert abs(one.last_step.grad_norm / float(norm) - 1) < 1e-6
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


def test_vectors_are_not_decayed_by_default(named: Any) -> None:
    parameters = named(**SHAPES)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    AdamW(parameters.items(), lr=0.1, weight_decay=0.1).step()
    assert torch.equal(parameters["bias"], before["bias"])
    torch.testing.assert_close(parameters["weight"].detach(), before["weight"] * 0.99)
