"""One choice for every layer under a budget of stored bits: an integer program, solved exactly.

Minimise sum cost[l, x_l] over the choices x_l of each layer l, with sum bits[l, x_l] within the budget, optionally a
second budget (operations, microseconds), and groups of layers that must take the same choice. scipy's `milp` (HiGHS)
solves hundreds of layers in milliseconds. It works in floating point, so what it returns is added up again in whole
bits, and solved again under a budget that is smaller by the excess where rounding let one through.
Shapes: L layers, C choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.core.errors import ConfigError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def solve(
    cost_LC: Floats,
    bits_LC: Ints,
    budget: int,
    *,
    second_LC: Ints | None = None,
    second_budget: int = 0,
    groups: Sequence[Sequence[int]] = (),
) -> list[int]:
    """Return the choice of each layer whose total cost is least.

    Args:
        cost_LC: predicted loss of each choice, finite.
        bits_LC: its stored bits.
        budget: most bits altogether.
        second_LC: another size of each choice.
        second_budget: most of it altogether.
        groups: layers that must take the same choice.

    Raises:
        ConfigError: not even the smallest choices are within a budget.
    """
    sizes, limits = [bits_LC.astype(np.int64)], [int(budget)]
    if second_LC is not None:
        sizes, limits = [*sizes, second_LC.astype(np.int64)], [*limits, int(second_budget)]
    allowed = list(limits)
    for _ in range(100):
        chosen = _solve(cost_LC, sizes, allowed, groups)
        if chosen is None:
            break
        excess = [total(size_LC, chosen) - limit for size_LC, limit in zip(sizes, limits, strict=True)]
        if max(excess) <= 0:
            return chosen
        allowed = [a - max(over, 0) for a, over in zip(allowed, excess, strict=True)]
    least = [int(size_LC.min(axis=1).sum()) for size_LC in sizes]
    raise ConfigError(
        f"no allocation is within the budget of {' and '.join(str(limit) for limit in limits)}",
        hint=f"the smallest choices of all layers add up to {' and '.join(str(size) for size in least)}",
    )


def total(size_LC: Ints, chosen: Sequence[int]) -> int:
    """Return the size of an allocation."""
    return int(size_LC[np.arange(len(size_LC)), list(chosen)].sum())


def random_choice(bits_LC: Ints, budget: int, seed: int) -> list[int]:
    """Return a random allocation that fills the budget: no layer could take its next larger choice as well.

    Raises:
        ConfigError: not even the smallest choices are within the budget.
    """
    generator = np.random.default_rng([seed, len(bits_LC)])
    order_LC = np.argsort(bits_LC, axis=1, kind="stable")
    ranks = generator.integers(0, bits_LC.shape[1], len(bits_LC))

    def size(ranks_L: NDArray[np.int64]) -> int:
        return total(bits_LC, list(np.take_along_axis(order_LC, ranks_L[:, None], axis=1)[:, 0]))

    while size(ranks) > budget:
        lowerable = np.flatnonzero(ranks > 0)
        if not len(lowerable):
            raise ConfigError(f"no allocation is within the budget of {budget}", hint=f"the least is {size(ranks)}")
        ranks[generator.choice(lowerable)] -= 1
    for layer in generator.permutation(len(bits_LC)):
        while ranks[layer] + 1 < bits_LC.shape[1] and size(ranks + (np.arange(len(ranks)) == layer)) <= budget:
            ranks[layer] += 1
    return [int(choice) for choice in np.take_along_axis(order_LC, ranks[:, None], axis=1)[:, 0]]


def uniform_choice(cost_LC: NDArray[np.float64], bits_LC: Ints, budget: int) -> int | None:
    """Return the choice of least cost that all layers can share within the budget; None where there is none."""
    within = np.flatnonzero(bits_LC.sum(axis=0) <= budget)
    return int(within[np.argmin(cost_LC.sum(axis=0)[within])]) if len(within) else None


def _solve(
    cost_LC: Floats, sizes: Sequence[Ints], limits: Sequence[int], groups: Sequence[Sequence[int]]
) -> list[int] | None:
    """Return the optimum in floating point; None where there is no solution."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, choices = cost_LC.shape
    one_each = np.kron(np.eye(layers), np.ones(choices))
    constraints: list[Any] = [LinearConstraint(one_each, 1, 1)]
    for size_LC, limit in zip(sizes, limits, strict=True):
        unit = max(int(np.gcd.reduce(size_LC, axis=None)), 1)
        constraints.append(LinearConstraint(size_LC.reshape(1, -1) / unit, -np.inf, limit // unit))
    for group in groups:
        for other in list(group)[1:]:
            same = np.zeros((layers, layers))
            same[0, group[0]], same[0, other] = 1, -1
            constraints.append(LinearConstraint(np.kron(same[:1], np.eye(choices)), 0, 0))
    scale = float(np.abs(cost_LC).max()) or 1.0
    found = milp(
        cost_LC.reshape(-1) / scale,
        constraints=constraints,
        integrality=np.ones(cost_LC.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    return None if found.x is None else [int(row.argmax()) for row in found.x.reshape(layers, choices)]
