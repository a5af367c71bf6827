"""The compiled passes: against float64, the same on any number of threads, and what they need."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.optim import native

LAMB = [0.1, 0.999, 0.001, 1.5, 2.0, 1e-6, 0.1, 0.01]
LARS = [0.9, 0.1, 0.1, 0.01]


def tensors(count: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(size)
    return [torch.randn(size, generator=generator).abs() for _ in range(count)]


def lamb(weights: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> Tensor:
    m = first + LAMB[0] * (gradient - first)
    v = LAMB[1] * second + LAMB[2] * gradient**2
    return m * LAMB[3] / ((v * LAMB[4]).sqrt() + LAMB[5]) + LAMB[6] * weights


def lars(weights: Tensor, gradient: Tensor, momentum: Tensor) -> Tensor:
    return LARS[0] * momentum + LARS[1] * (gradient + LARS[2] * weights)


@pytest.mark.parametrize(("rule", "update", "scalars"), [("lamb", lamb, LAMB), ("lars", lars, LARS)])
def test_sums_of_squares_are_those_of_float64_to_1e_6_at_any_length(rule: Any, update: Any, scalars: Any) -> None:
    moments = 2 if rule == "lamb" else 1
    rows = [tensors(2 + moments, size) for size in (1, 15, 17, 4096, 4097, 600_001)]
    found = native.measure(rule, rows, [scalars] * len(rows), [True] * len(rows))
    for sums, row in zip(found.tolist(), rows, strict=True):
        wide = [array.double() for array in row]
        expected = [float(vector.square().sum()) for vector in (wide[1], update(*wide), wide[0])]
        assert sums == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("rule", "update", "scalars"), [("lamb", lamb, LAMB), ("lars", lars, LARS)])
def test_a_step_moves_weights_and_moments_as_float64_does_at_any_length(rule: Any, update: Any, scalars: Any) -> None:
    moments = 2 if rule == "lamb" else 1
    rows = [tensors(2 + moments, size) for size in (1, 15, 17, 4097, 600_001)]
    before = [[array.double() for array in row] for row in rows]
    native.apply(rule, rows, [scalars] * len(rows))
    for row, wide in zip(rows, before, strict=True):
        weights, gradient, *old = wide
        first = old[0] + LAMB[0] * (gradient - old[0]) if rule == "lamb" else update(*wide)
        second = [LAMB[1] * old[1] + LAMB[2] * gradient**2] if rule == "lamb" else []
        for found, expected in zip(row, [weights - 0.01 * update(*wide), gradient, first, *second], strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-7)


def test_a_step_writes_no_element_beside_a_view() -> None:
    partitions = [torch.full((100,), -7.0) for _ in range(4)]
    views = [partition[3:40].copy_(array) for partition, array in zip(partitions, tensors(4, 37), strict=True)]
    native.apply("lamb", [views], [LAMB])
    for partition in partitions:
        assert (torch.cat([partition[:3], partition[40:]]) == -7).all()


def test_a_tensor_without_a_trust_ratio_is_measured_by_its_gradient_alone() -> None:
    rows = [tensors(4, 5000), tensors(4, 300)]
    sums = native.measure("lamb", rows, [LAMB, LAMB], [False, True])
    assert sums[0].tolist() == [pytest.approx(float(rows[0][1].double().square().sum()), rel=1e-6), 0.0, 0.0]
    assert (sums[1] > 0).all()


def test_the_number_of_threads_changes_no_bit() -> None:
    rows = [tensors(4, size) for size in (10, 900_001, 300_000)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            stepped = [[array.clone() for array in row] for row in rows]
            native.apply("lamb", stepped, [LAMB] * 3)
            sums = native.measure("lamb", rows, [LAMB] * 3, [True] * 3)
            results.append(torch.cat([sums.reshape(-1), *(array.double() for row in stepped for array in row)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_gradient_that_cannot_be_squared_shows_in_the_sums_of_its_own_tensor_only(bad: float) -> None:
    rows = [tensors(4, 5000), tensors(4, 5001)]
    rows[1][1][4999] = bad
    finite = torch.isfinite(native.measure("lamb", rows, [LAMB, LAMB], [True] * 2))
    assert finite[0].all()
    assert not finite[1, 0]


def test_elements_beside_a_view_are_not_looked_at() -> None:
    partitions = [torch.full((100,), math.nan) for _ in range(4)]
    views = [partition[3:40].copy_(array) for partition, array in zip(partitions, tensors(4, 37), strict=True)]
    assert torch.equal(
        native.measure("lamb", [views], [LAMB], [True]), native.measure("lamb", [tensors(4, 37)], [LAMB], [True])
    )


def test_denormal_numbers_stay_on_in_the_process() -> None:
    native.measure("lamb", [tensors(4, 100)], [LAMB], [True])
    tiny = torch.tensor([1e-40])
    assert float(tiny * 0.5) > 0


def test_a_missing_compiler_is_named_with_what_to_do(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native._library.cache_clear()
    with pytest.raises(RuntimeError, match=r"no-such-compiler is not found: install one, name one in CXX"):
        native.measure("lamb", [tensors(4, 3)], [LAMB], [True])
    native._library.cache_clear()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    native._library.cache_clear()
    with pytest.raises(RuntimeError, match=r"false could not compile native\.cpp"):
        native.measure("lamb", [tensors(4, 3)], [LAMB], [True])
    native._library.cache_clear()
    assert list((tmp_path / "ingot").iterdir()) == []
