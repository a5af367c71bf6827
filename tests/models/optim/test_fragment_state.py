"""Moments by fragment, the active set, and saving and loading."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from models.optim.adamw import AdamW
from models.optim.fragment_layout import Fragment, Layout
from models.optim.lamb import Lamb
from models.optim.lars import Lars

SHAPES = {"a": (5, 7), "b": (3, 3), "c": (4,)}


def flat_optimizer(kind: Any = Lamb) -> tuple[Any, nn.Parameter]:
    """Return an optimizer bound to one partition that holds two tensors and padding."""
    partition = nn.Parameter(torch.arange(1.0, 13.0))
    optimizer = kind([("x", nn.Parameter(torch.ones(2, 3))), ("y", nn.Parameter(torch.ones(2, 2)))], lr=0.1)
    shapes = {"x": (2, 3), "y": (2, 2)}
    parts = (Fragment("x", (2, 3), 0, 6, partition, 0), Fragment("y", (2, 2), 0, 4, partition, 6))
    optimizer.param_groups[0]["params"] = [partition]
    optimizer.bind(Layout(parts, shapes, dict.fromkeys(shapes, partition)))
    return optimizer, partition


@pytest.mark.parametrize(
    ("kind", "moments"), [(Lamb, {"exp_avg", "exp_avg_sq"}), (AdamW, {"exp_avg", "exp_avg_sq"}), (Lars, {"momentum"})]
)
def test_moments_appear_with_the_first_step_as_live_views(kind: Any, moments: set[str], named: Any, fill: Any) -> None:
    parameters = named(**SHAPES)
    optimizer = kind(parameters.items())
    assert all(optimizer.fragment_state(f) == {} for f in optimizer.fragments)
    fill(parameters, 0)
    optimizer.step()
    state = optimizer.fragment_state(optimizer.fragments[0])
    assert set(state) == moments
    assert all(tensor.shape == (35,) for tensor in state.values())
    before = next(iter(state.values())).clone()
    fill(parameters, 1)
    optimizer.step()
    assert not torch.equal(next(iter(state.values())), before)


def test_frozen_tensors_keep_every_byte_and_hold_no_moments(named: Any, fill: Any) -> None:
    parameters = named(**SHAPES)
    optimizer = Lamb(parameters.items(), lr=0.1, weight_decay=0.1)
    fill(parameters, 0)
    optimizer.step()
    optimizer.set_active(["b"])
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    fill(parameters, 1)  # gradients of frozen tensors are there, as stale ones are under CPU offload
    optimizer.step()
    assert torch.equal(parameters["a"], before["a"])
    assert torch.equal(parameters["c"], before["c"])
    assert not torch.equal(parameters["b"], before["b"])
    assert optimizer.state_bytes() == 9 * 4 * 2


def test_a_tensor_that_returns_starts_anew(named: Any, fill: Any) -> None:
    parameters = named(**SHAPES)
    optimizer = Lamb(parameters.items(), lr=0.01)
    for step in range(3):
        fill(parameters, step)
        optimizer.step()
    optimizer.set_active(["b"])
    optimizer.set_active(None)
    assert optimizer.counters() == {"a": 0, "b": 3, "c": 0}
    fresh = {name: nn.Parameter(parameters[name].detach().clone()) for name in ("a", "c")}
    other = Lamb(fresh.items(), lr=0.01)
    gradients = fill(parameters, 3)
    for name, parameter in fresh.items():
        parameter.grad = gradients[name]
    optimizer.step()
    other.step()
    assert all(torch.equal(parameters[name], fresh[name]) for name in fresh)


def test_a_tensor_that_stays_active_keeps_its_moments() -> None:
    optimizer, partition = flat_optimizer()
    partition.grad = torch.ones(12)
    optimizer.step()
    x, y = optimizer.fragments
    kept = {name: tensor.clone() for name, tensor in optimizer.fragment_state(y).items()}
    assert optimizer.state_bytes() == 12 * 4 * 2
    optimizer.set_active(["y"])
    assert optimizer.fragment_state(x) == {}
    assert all(torch.equal(optimizer.fragment_state(y)[name], kept[name]) for name in kept)
    assert optimizer.state_bytes() == 4 * 4 * 2


def test_flat_moments_lie_where_deepspeeds_checkpoints_look() -> None:
    optimizer, partition = flat_optimizer(AdamW)
    partition.grad = torch.ones(12)
    optimizer.step()
    assert optimizer.state[partition]["exp_avg"].shape == partition.shape


def test_moments_by_fragment_are_refused_by_torchs_state_dict() -> None:
    optimizer, partition = flat_optimizer()
    optimizer.set_active(["x"])
    partition.grad = torch.ones(12)
    optimizer.step()
    with pytest.raises(ValueError, match="fragment_state"):
        optimizer.state_dict()


@pytest.mark.parametrize("kind", [Lamb, Lars, AdamW])
@pytest.mark.parametrize("way", ["fragments", "state_dict"])
def test_training_resumes_bit_for_bit(kind: Any, way: str, named: Any, fill: Any) -> None:
    parameters = named(**SHAPES)
    optimizer = kind(parameters.items(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        fill(parameters, step)
        optimizer.step()
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    resumed = kind(copies.items(), lr=0.01, weight_decay=0.1)
    if way == "fragments":
        for source, target in zip(optimizer.fragments, resumed.fragments, strict=True):
            saved = {name: tensor.clone() for name, tensor in optimizer.fragment_state(source).items()}
            resumed.load_fragment_state(target, saved)
        resumed.load_counters(json.loads(json.dumps(optimizer.counters())))
    else:
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        fill(parameters, step)
        fill(copies, step)
        optimizer.step()
        resumed.step()
    assert all(torch.equal(parameters[name], copies[name]) for name in SHAPES)


def test_an_empty_mapping_drops_moments_and_wrong_ones_are_refused() -> None:
    optimizer, _ = flat_optimizer()
    x, y = optimizer.fragments
    good = {"exp_avg": torch.ones(6), "exp_avg_sq": torch.ones(6)}
    optimizer.load_fragment_state(x, good)
    assert torch.equal(optimizer.fragment_state(x)["exp_avg"], torch.ones(6))
    with pytest.raises(ValueError, match="y: exp_avg has 6 elements, not 4"):
        optimizer.load_fragment_state(y, good)
    with pytest.raises(ValueError, match="got moments momentum"):
        optimizer.load_fragment_state(x, {"momentum": torch.ones(6)})
    optimizer.load_fragment_state(x, {})
    assert optimizer.fragment_state(x) == {}


def test_unknown_names_are_refused() -> None:
    optimizer, _ = flat_optimizer()
    with pytest.raises(ValueError, match="no tensor is named z; the names are like x, y"):
        optimizer.set_active(["x", "z"])
    with pytest.raises(ValueError, match="no tensor is named q"):
        optimizer.load_counters({"q": 1})
