"""Parameters layer by layer, for methods that share a budget of stored bits out among layers.

An integer program, solved exactly: minimise sum cost[l, x_l] over the options x_l of each layer l, with sum
bits[l, x_l] within the budget, optionally a second budget (operations, microseconds), and groups of layers that must
take the same option. scipy's `milp` (HiGHS) solves hundreds of layers in milliseconds. It works in floating point, so
what it returns is added up again in whole bits, and solved again under a budget that is smaller by the excess where
rounding let one through.

Shapes: L layers, C options.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.compression.base import BitAllocation, Cost, Statistics
from pipelines.compression import calibration, sensitivity
from pipelines.compression.report import Allocation
from pipelines.compression.run import CompressionRun
from pipelines.compression.sequential import Assignment
from pipelines.core.errors import ConfigError
from pipelines.modelio import meta_init

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
RANDOM_ALLOCATIONS = 6
"""Random allocations whose predicted loss is reported."""


@dataclass(frozen=True)
class Allocated:
    """What each layer was given, and what that was predicted to cost beside other allocations."""

    assignment: Assignment
    baselines: Mapping[str, Assignment] = field(default_factory=dict)
    """Other allocations within the budget: a random one, and the best that is uniform."""
    report: Allocation | None = None
    """None where nothing was shared out."""


@dataclass(frozen=True)
class Costs:
    """Stored bits, bit operations and predicted loss of every option for every layer."""

    bits_LC: Ints
    loss_LC: Floats
    operations_LC: Ints
    weights: int
    """Number of weights of all layers."""


def allocate(run: CompressionRun, assignment: Assignment) -> Allocated:
    """Return the allocation of least predicted loss within the method's budget.

    Raises:
        ConfigError: no allocation is within the budget.
    """
    wanted = assignment.method.allocation(assignment.config)
    if wanted is None:
        return Allocated(assignment)
    costs = costs_of(run, assignment, wanted)
    bits_LC, cost_LC = costs.bits_LC, costs.loss_LC
    budget, names = int(wanted.budget * costs.weights), assignment.names
    # Each weight is multiplied once for each token, so the mean over multiplications is over weights.
    operations = int(wanted.operations_budget * costs.weights) if wanted.operations_budget else None
    second = None if operations is None else Second(costs.operations_LC, operations)
    best = solve(cost_LC, bits_LC, budget, second=second, groups=_tied(names, wanted.tied_layers))
    random = [random_choice(bits_LC, budget, seed, second=second) for seed in range(RANDOM_ALLOCATIONS)]
    uniform = uniform_choice(cost_LC, bits_LC, budget, second=second)

    def given(options: Sequence[int]) -> Assignment:
        return replace(
            assignment, of_layer={name: wanted.options[option] for name, option in zip(names, options, strict=True)}
        )

    def predicted(options: Sequence[int]) -> float:
        return float(cost_LC[np.arange(len(names)), list(options)].sum())

    chosen, baselines = given(best), {"random allocation": given(random[0])}
    if uniform is not None:
        baselines["uniform allocation"] = given([uniform] * len(names))
    report = Allocation(
        budget_bits=budget,
        stored_bits=total(bits_LC, best),
        budget_operations=operations,
        operations=None if operations is None else total(costs.operations_LC, best),
        predicted=predicted(best),
        random=[predicted(options) for options in random],
        uniform=None if uniform is None else float(cost_LC[:, uniform].sum()),
        layers={name: config.model_dump(mode="json") for name, config in chosen.of_layer.items()},
    )
    return Allocated(chosen, baselines, report)


def costs_of(run: CompressionRun, assignment: Assignment, wanted: BitAllocation[Any]) -> Costs:
    """Ask the method what every option would cost every layer, block by block."""
    costs: dict[str, list[Cost]] = {}
    weights = 0
    for name, seen in _statistics(run, assignment.names, wanted):
        weight_OI = run.weight(name)
        weights += weight_OI.numel()
        costs[name] = [assignment.method.cost(weight_OI, seen, option) for option in wanted.options]
    ordered = [costs[name] for name in assignment.names]
    bits_LC = np.array([[cost.stored_bits for cost in row] for row in ordered], dtype=np.int64)
    operations_LC = np.array([[cost.operations for cost in row] for row in ordered], dtype=np.int64)
    return Costs(bits_LC, np.array([[cost.loss for cost in row] for row in ordered]), operations_LC, weights)


def _statistics(
    run: CompressionRun, names: Sequence[str], wanted: BitAllocation[Any]
) -> Iterator[tuple[str, Statistics]]:
    """Yield what losses are predicted from for each layer of the base model, one block after another."""
    if wanted.sensitivity_source == "curvature":
        curvature = sensitivity.traces(run.load_base(), names, run.text, probes=wanted.probes, seed=run.config.seed)
        yield from ((name, Statistics(curvature=value)) for name, value in curvature.items())
    elif wanted.sensitivity_source == "gradients":
        for index in range(len(meta_init.blocks(run.base)[1])):
            squares = sensitivity.read(run.fisher, index, run.device)
            yield from ((name, Statistics(fisher_OI=squares[name])) for name in names if name in squares)
    else:
        yield from _second_moments(run, names)


def _second_moments(run: CompressionRun, names: Sequence[str]) -> Iterator[tuple[str, Statistics]]:
    model = run.base
    stack, layers = meta_init.blocks(model)
    meta_init.load_rest(model, stack, run.reader, run.device)
    prefix = calibration.enter(model, layers, run.text, run.device, in_tuples=run.description.in_tuples)
    for index, block in enumerate(layers):
        place = f"{stack}.{index}"
        meta_init.load(block, place, run.reader, run.device, model.dtype)
        yield from calibration.measure(block, calibration.linear_layers(model, place, names), index, prefix).items()
        prefix.advance(index, block)
        meta_init.release(block)


def _tied(names: Sequence[str], patterns: Sequence[str]) -> list[list[int]]:
    """Return the positions of layers that match the same pattern, which get the same option."""
    groups = [[i for i, name in enumerate(names) if fnmatch.fnmatchcase(name, pattern)] for pattern in patterns]
    return [group for group in groups if len(group) > 1]


# ---- the integer program ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Second:
    """A second budget."""

    size_LC: Ints
    """Another size of each choice than its stored bits."""
    budget: int
    """Most of it altogether."""


def solve(
    cost_LC: Floats,
    bits_LC: Ints,
    budget: int,
    *,
    second: Second | None = None,
    groups: Sequence[Sequence[int]] = (),
) -> list[int]:
    """Return the option of each layer whose total cost is least.

    Args:
        cost_LC: predicted loss of each choice, finite.
        bits_LC: its stored bits.
        budget: most bits altogether.
        second: another size of each choice, and its budget.
        groups: layers that must take the same option.

    Raises:
        ConfigError: not even the smallest options are within a budget.
    """
    sizes, limits = [bits_LC.astype(np.int64)], [int(budget)]
    if second is not None:
        sizes, limits = [*sizes, second.size_LC.astype(np.int64)], [*limits, int(second.budget)]
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
        hint=f"the smallest options of all layers add up to {' and '.join(str(size) for size in least)}",
    )


def total(size_LC: Ints, chosen: Sequence[int]) -> int:
    """Return the size of an allocation."""
    return int(size_LC[np.arange(len(size_LC)), list(chosen)].sum())


def random_choice(bits_LC: Ints, budget: int, seed: int, *, second: Second | None = None) -> list[int]:
    """Return a random allocation that fills the budgets: no layer could take its next larger choice as well.

    Raises:
        ConfigError: not even the smallest options are within the budget.
    """
    generator = np.random.default_rng([seed, len(bits_LC)])
    order_LC = np.argsort(bits_LC, axis=1, kind="stable")
    ranks = generator.integers(0, bits_LC.shape[1], len(bits_LC))

    def choices(ranks_L: NDArray[np.int64]) -> list[int]:
        return [int(choice) for choice in np.take_along_axis(order_LC, ranks_L[:, None], axis=1)[:, 0]]

    def too_large(ranks_L: NDArray[np.int64]) -> bool:
        chosen = choices(ranks_L)
        over = total(bits_LC, chosen) > budget
        return over or (second is not None and total(second.size_LC, chosen) > second.budget)

    while too_large(ranks):
        lowerable = np.flatnonzero(ranks > 0)
        if not len(lowerable):
            least = total(bits_LC, choices(ranks))
            raise ConfigError(f"no allocation is within the budget of {budget}", hint=f"the least is {least}")
        ranks[generator.choice(lowerable)] -= 1
    for layer in generator.permutation(len(bits_LC)):
        while ranks[layer] + 1 < bits_LC.shape[1] and not too_large(ranks + (np.arange(len(ranks)) == layer)):
            ranks[layer] += 1
    return choices(ranks)


def uniform_choice(cost_LC: Floats, bits_LC: Ints, budget: int, *, second: Second | None = None) -> int | None:
    """Return the choice of least cost that all layers can share within the budgets; None where there is none."""
    fits_C = bits_LC.sum(axis=0) <= budget
    if second is not None:
        fits_C &= second.size_LC.sum(axis=0) <= second.budget
    within = np.flatnonzero(fits_C)
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
