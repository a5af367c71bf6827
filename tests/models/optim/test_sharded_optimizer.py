"""The shared step: atomic skipping, blocks, and two ranks simulated by splitting flat buffers in one process."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.optim import sharded_optimizer
from models.optim.adamw import AdamW
from models.optim.fragment_layout import Fragment, Layout
from models.optim.lamb import Lamb
from models.optim.lars import Lars

KINDS = [Lamb, Lars, AdamW, partial(Lamb, compiled=True), partial(Lars, compiled=True)]
SHAPES = {"a": (5, 7), "b": (3, 3), "c": (4,), "d": (2, 11)}


def two_ranks(parameters: dict[str, nn.Parameter], cut: int, make: Callable[[], Any]) -> list[tuple[Any, nn.Parameter]]:
    """Return two bound optimizers, each over a part of one flat buffer; `reduce` meets the other rank's thread."""
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
    meeting, given = threading.Barrier(2), [torch.empty(0), torch.empty(0)]

    def reducer(rank: int) -> Callable[[Tensor], Tensor]:
        def reduce(sums: Tensor) -> Tensor:
            given[rank] = sums
            meeting.wait(20)
            total = given[0] + given[1]
            meeting.wait(20)
            return total

        return reduce

    ranks = []
    for rank, (low, high) in enumerate([(0, cut), (cut, len(flat))]):
        partition = nn.Parameter(torch.cat([flat[low:high], torch.full((3,), math.nan)]))  # ends in padding
        found, at = [], 0
        for name, parameter in parameters.items():
            first, last = max(at, low), min(at + parameter.numel(), high)
            if first < last:
                found.append(Fragment(name, tuple(parameter.shape), first - at, last - first, partition, first - low))
            at += parameter.numel()
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        optimizer = make()
        optimizer.param_groups[0]["params"] = [partition]
        optimizer.bind(Layout(tuple(found), shapes, dict.fromkeys(shapes, partition), reducer(rank)))
        ranks.append((optimizer, partition))
    return ranks


def step_together(ranks: list[tuple[Any, nn.Parameter]]) -> None:
    threads = [threading.Thread(target=optimizer.step) for optimizer, _ in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


def hand_out(gradients: dict[str, Tensor], ranks: list[tuple[Any, nn.Parameter]]) -> None:
    for optimizer, partition in ranks:
        partition.grad = torch.full_like(partition, math.nan)  # padding must not be looked at
        for f in optimizer.fragments:
            f.of(partition.grad).copy_(gradients[f.name].flatten()[f.start : f.start + f.numel])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 20, 40, 60])
def test_a_cut_through_any_tensor_changes_nothing(kind: Any, cut: int, named: Any, fill: Any) -> None:
    parameters = named(**SHAPES)
    options = {"lr": 0.02, "weight_decay": 0.1, "max_grad_norm": 3.0}
    ranks = two_ranks(parameters, cut, lambda: kind(named(**SHAPES).items(), **options))
    whole = kind(parameters.items(), **options)
    for step in range(5):
        hand_out(fill(parameters, step), ranks)
        whole.step()
        step_together(ranks)
    for optimizer, _ in ranks:
        assert optimizer.trust_ratios() == pytest.approx(whole.trust_ratios(), rel=1e-6)
        for f in optimizer.fragments:
            expected = parameters[f.name].detach().flatten()[f.start : f.start + f.numel]
            torch.testing.assert_close(f.master, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_on_one_rank_leaves_both_ranks_unchanged(kind: Any, named: Any, fill: Any) -> None:
    parameters = named(**SHAPES)
    ranks = two_ranks(parameters, 30, lambda: kind(named(**SHAPES).items()))
    gradients = fill(parameters, 0)
    hand_out(gradients, ranks)
    step_together(ranks)
    before = [
        (f.master.clone(), {name: moment.clone() for name, moment in optimizer.fragment_state(f).items()})
        for optimizer, _ in ranks
        for f in optimizer.fragments
    ]
    gradients["d"][1, 3] = math.nan
    hand_out(gradients, ranks)
    step_together(ranks)
    after = [(f.master, optimizer.fragment_state(f)) for optimizer, _ in ranks for f in optimizer.fragments]
    for (weights, moments), (weights_after, moments_after) in zip(before, after, strict=True):
        assert torch.equal(weights, weights_after)
        assert all(torch.equal(moments[name], moments_after[name]) for name in moments)
    assert all(optimizer.last_step.skipped for optimizer, _ in ranks)
    assert all(set(optimizer.counters().values()) == {1} for optimizer, _ in ranks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_gradient_that_cannot_be_squared_skips_the_step(kind: Any, bad: float, named: Any, fill: Any) -> None:
    parameters = named(**SHAPES)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = kind(parameters.items())
    fill(parameters, 0)
    parameters["c"].grad[1] = bad
    optimizer.step()
    assert optimizer.last_step.skipped
    assert all(torch.equal(parameters[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_after_a_skipped_step_as_if_it_had_not_been(kind: Any, named: Any, fill: Any) -> None:
    finals = []
    for bad_step in (None, 1):
        parameters = named(**SHAPES)
        optimizer = kind(parameters.items(), lr=0.01)
        for step in range(3):
            if step == bad_step:
                fill(parameters, 99)
                parameters["a"].grad[0, 0] = math.nan
                optimizer.step()
            fill(parameters, step)
            optimizer.step()
        finals.append(torch.cat([parameter.detach().flatten() for parameter in parameters.values()]))
    assert torch.equal(*finals)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_any_size_give_the_same_weights(kind: Any, named: Any, fill: Any, monkeypatch: Any) -> None:
    finals = []
    for size in (1 << 16, 7):
        monkeypatch.setattr(sharded_optimizer, "CPU_BLOCK", size)
        parameters = named(**SHAPES)
        optimizer = kind(parameters.items(), lr=0.01, weight_decay=0.1)
        for step in range(4):
            fill(parameters, step)
            optimizer.step()
        finals.append(torch.cat([parameter.detach().flatten() for parameter in parameters.values()]))
    torch.testing.assert_close(*finals, rtol=0, atol=1e-6)


def test_an_engine_that_steps_group_by_group_gets_one_step_at_the_last_call(named: Any, fill: Any) -> None:
    parameters, together = named(**SHAPES), named(**SHAPES)
    pushed: list[int] = []
    optimizer = Lamb([{"params": [pair]} for pair in parameters.items()], lr=0.01, max_grad_norm=1.0)
    layout = optimizer.layout
    optimizer.bind(
        Layout(
            layout.fragments,
            layout.shapes,
            layout.partition_of,
            copy_to_weights=lambda partitions: pushed.extend(map(id, partitions)),
        )
    )
    whole = Lamb(together.items(), lr=0.01, max_grad_norm=1.0)
    groups = optimizer.param_groups
    for step in range(3):
        fill(parameters, step)
        fill(together, step)
        pushed.clear()
        for group in groups:
            unchanged = [parameter.detach().clone() for parameter in parameters.values()]
            optimizer.param_groups = [group]
            optimizer.step()
            if group is not groups[-1]:
                assert all(torch.equal(p, q) for p, q in zip(parameters.values(), unchanged, strict=True))
                group["params"][0].grad = None  # as DeepSpeed does
        optimizer.param_groups = groups
        whole.step()
        assert pushed == [id(parameter) for parameter in list(parameters.values())[:-1]]
    for name in SHAPES:
        torch.testing.assert_close(parameters[name], together[name], rtol=0, atol=1e-6)


def test_a_parameter_without_a_gradient_is_left_alone(named: Any, fill: Any) -> None:
    parameters = named(**SHAPES)
    before = parameters["b"].detach().clone()
    optimizer = Lamb(parameters.items())
    fill(parameters, 0)
    parameters["b"].grad = None
    optimizer.step()
    assert torch.equal(parameters["b"], before)
    assert optimizer.counters() == {"a": 1, "b": 0, "c": 1, "d": 1}
    assert "b" not in optimizer.trust_ratios()


def test_a_closure_is_evaluated_with_gradients(named: Any) -> None:
    parameters = named(a=(3, 3))
    optimizer = AdamW(parameters.items(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameters["a"].square().sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second.item() < first.item()


def test_clipping_uses_the_norm_of_active_tensors_only(named: Any, fill: Any) -> None:
    parameters = named(**SHAPES)
    optimizer = AdamW(parameters.items(), max_grad_norm=1.0)
    gradients = fill(parameters, 0)
    optimizer.set_active(["a", "c"])
    optimizer.step()
    expected = math.sqrt(sum(float(gradients[name].square().sum()) for name in ("a", "c")))
    assert optimizer.last_step.grad_norm == pytest.approx(expected, rel=1e-6)


def test_weight_norms_are_those_of_the_tensors(named: Any) -> None:
    parameters = named(big=(300, 500), **SHAPES)
    norms = Lamb(parameters.items()).weight_norms()
    assert norms == pytest.approx({name: float(p.detach().double().norm()) for name, p in parameters.items()}, rel=1e-6)


def test_half_precision_masters_are_refused() -> None:
    optimizer = Lamb([nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match=r"bfloat16; float32 is needed"):
        _ = optimizer.fragments
