"""The integer program against trying every allocation, and budgets that hold to the bit."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.compression import allocate
from pipelines.core.errors import ConfigError


def problem(seed: int, layers: int = 6, choices: int = 4) -> tuple[Any, Any]:
    """Return costs that mostly fall as bits rise, and bits."""
    generator = np.random.default_rng(seed)
    weights = generator.integers(500, 5000, (layers, 1))
    bits = weights * np.array([2, 3, 4, 8])[:choices] + generator.integers(0, 200, (layers, choices))
    cost = generator.lognormal(0, 2, (layers, 1)) / 4.0 ** np.array([2, 3, 4, 8])[:choices]
    return cost * generator.lognormal(0, 0.3, (layers, choices)), bits


def brute(cost: Any, bits: Any, budget: int, accept: Any = lambda _: True) -> float:
    """Return the least cost of all allocations that fit and are accepted; infinite where there is none."""
    rows = np.arange(len(cost))
    every = (list(chosen) for chosen in itertools.product(range(cost.shape[1]), repeat=len(cost)))
    fitting = (chosen for chosen in every if bits[rows, chosen].sum() <= budget and accept(chosen))
    return min((float(cost[rows, chosen].sum()) for chosen in fitting), default=float("inf"))


def price(cost: Any, chosen: list[int]) -> float:
    """Return the cost of an allocation."""
    return float(cost[np.arange(len(cost)), chosen].sum())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.8, 1.0])
def test_it_is_the_best_of_all_allocations(seed: int, share: float) -> None:
    cost, bits = problem(seed)
    least, most = int(bits.min(1).sum()), int(bits.max(1).sum())
    budget = least + int(share * (most - least))
    chosen = allocate.solve(cost, bits, budget)
    assert allocate.total(bits, chosen) <= budget
    assert price(cost, chosen) == pytest.approx(brute(cost, bits, budget), rel=1e-9)


def test_one_bit_less_is_another_allocation() -> None:
    cost, bits = problem(0)
    chosen = allocate.solve(cost, bits, 60000)
    size = allocate.total(bits, chosen)
    assert allocate.solve(cost, bits, size) == chosen
    other = allocate.solve(cost, bits, size - 1)
    assert allocate.total(bits, other) < size
    assert price(cost, other) > price(cost, chosen)


def test_a_budget_of_terabits_holds_to_the_bit() -> None:
    """At this size one part in 10^7, the solver's tolerance, is a hundred thousand bits."""
    cost, bits = problem(1, layers=40)
    large = bits * 10_000_019
    for share in (0.2, 0.5, 0.7):
        budget = int(large.min(1).sum() + share * (large.max(1).sum() - large.min(1).sum()))
        chosen = allocate.solve(cost, large, budget)
        assert allocate.total(large, chosen) <= budget
        assert allocate.solve(cost, large, allocate.total(large, chosen)) == chosen


@pytest.mark.parametrize("seed", range(3))
def test_a_second_budget_binds_as_well(seed: int) -> None:
    cost, bits = problem(seed)
    second = np.random.default_rng(seed + 50).integers(1, 100, bits.shape)
    budget, limit, rows = int(bits.max(1).sum() * 0.7), int(second.min(1).sum() * 1.3), np.arange(len(bits))
    chosen = allocate.solve(cost, bits, budget, second_LC=second, second_budget=limit)
    expected = brute(cost, bits, budget, lambda found: second[rows, found].sum() <= limit)
    assert price(cost, chosen) == pytest.approx(expected, rel=1e-9)
    assert expected > brute(cost, bits, budget), "it binds"


@pytest.mark.parametrize("seed", range(3))
def test_layers_of_a_group_take_the_same_choice(seed: int) -> None:
    cost, bits = problem(seed)
    budget = int(bits.max(1).sum() * 0.5)
    chosen = allocate.solve(cost, bits, budget, groups=[[0, 2, 5], [1, 4]])
    expected = brute(cost, bits, budget, lambda c: c[0] == c[2] == c[5] and c[1] == c[4])
    assert len({chosen[0], chosen[2], chosen[5]}) == len({chosen[1], chosen[4]}) == 1
    assert price(cost, chosen) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), layers=st.integers(1, 4), choices=st.integers(1, 4))
def test_it_is_the_best_for_any_problem(seed: int, layers: int, choices: int) -> None:
    cost, bits = problem(seed, layers, choices)
    budget = int(np.random.default_rng(seed).integers(bits.min(1).sum(), bits.max(1).sum() + 1))
    assert price(cost, allocate.solve(cost, bits, budget)) == pytest.approx(brute(cost, bits, budget), rel=1e-9)


def test_hundreds_of_layers_are_solved() -> None:
    cost, bits = problem(3, layers=300)
    budget = int(bits.max(1).sum() * 0.45)
    chosen = allocate.solve(cost, bits, budget)
    assert allocate.total(bits, chosen) <= budget
    assert price(cost, chosen) < min(price(cost, allocate.random_choice(bits, budget, seed)) for seed in range(20))


def test_a_budget_below_the_smallest_choices_is_refused_with_their_size() -> None:
    cost, bits = problem(0)
    least = int(bits.min(1).sum())
    with pytest.raises(ConfigError, match=f"within the budget of {least - 1}") as error:
        allocate.solve(cost, bits, least - 1)
    assert str(least) in str(error.value.hint)
    with pytest.raises(ConfigError, match="within the budget"):
        allocate.random_choice(bits, least - 1, seed=0)


@pytest.mark.parametrize("seed", range(5))
def test_random_allocations_fill_the_budget_and_repeat_by_seed(seed: int) -> None:
    _, bits = problem(0)
    budget = int(bits.max(1).sum() * 0.6)
    chosen = allocate.random_choice(bits, budget, seed)
    assert chosen == allocate.random_choice(bits, budget, seed)
    assert allocate.total(bits, chosen) <= budget
    for layer, choice in enumerate(chosen):
        larger = sorted(size for size in bits[layer] if size > bits[layer, choice])
        if larger:
            assert allocate.total(bits, chosen) - bits[layer, choice] + larger[0] > budget


def test_random_allocations_differ() -> None:
    _, bits = problem(0)
    assert len({tuple(allocate.random_choice(bits, 60000, seed)) for seed in range(8)}) > 5


@pytest.mark.parametrize("seed", range(5))
def test_the_uniform_arm_is_the_best_that_fits_even_where_a_larger_one_is_worse(seed: int) -> None:
    cost, bits = problem(seed)
    cost[:, 2] = cost[:, 0] + 1
    sizes = bits.sum(0)
    for budget in (int(sizes[2]), int(sizes[1]), int(sizes[2]) - 1, int(sizes.max())):
        fitting = [choice for choice in range(bits.shape[1]) if sizes[choice] <= budget]
        best = min(fitting, key=lambda choice: float(cost[:, choice].sum()))
        assert allocate.uniform_choice(cost, bits, budget) == best
        assert best != 2
    assert allocate.uniform_choice(cost, bits, int(sizes.min()) - 1) is None
