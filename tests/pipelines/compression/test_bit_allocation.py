"""Widths layer by layer through the stage: the budget, what was predicted, and variants of mixed widths.

That plain transformers loads them is tested with the other variants in `test_layout.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.compression import gptq, hawq
from models.compression.base import Statistics
from pipelines.compression import bit_allocation, sequential
from pipelines.compression.sequential import Assignment
from pipelines.core.errors import ConfigError
from pipelines.modelio.folder import WeightReader, read_record
from pipelines.modelio.load import is_private, load_model

MIXED = {"method": "hawq", "budget": 4.0, "group_size": 0, "samples": 8}


def widths(report: dict[str, Any]) -> dict[str, int]:
    """Return layer -> width."""
    return {name: row["bits"] for name, row in report["allocation"]["layers"].items()}


@pytest.mark.parametrize("sensitivity", ["curvature", "gradients", "hessian"])
def test_layers_get_their_own_widths_within_the_budget(
    sensitivity: str, small: Any, compress: Callable[..., Any]
) -> None:
    _, report = compress(small(), MIXED | {"sensitivity": sensitivity})
    told = report["allocation"]
    assert len(set(widths(report).values())) > 1
    assert told["stored_bits"] == report["totals"]["stored_bits"] <= told["budget_bits"]
    assert told["budget_bits"] == int(4.0 * report["totals"]["weights"])
    assert told["predicted"] < min(told["random"])
    assert told["predicted"] <= told["uniform"]
    assert len(told["random"]) == 6


def test_the_same_run_twice_allocates_the_same(small: Any, compress: Callable[..., Any]) -> None:
    one, two = (compress(small(), MIXED)[1] for _ in range(2))
    assert one == two


def test_every_width_is_recorded_and_read_back(small: Any, compress: Callable[..., Any]) -> None:
    out, report = compress(small(), MIXED)
    record = read_record(out / "model")
    assert record is not None
    reader = WeightReader(out / "model")
    for name, width in widths(report).items():
        assert record["layers"][name]["config"]["bits"] == width
        assert max(len(set(row.tolist())) for row in reader.dense(f"{name}.weight")) <= 2**width


def test_layers_that_belong_together_share_a_width(small: Any, compress: Callable[..., Any]) -> None:
    _, report = compress(small(), MIXED | {"tied_layers": ["*layers.0.self_attn.*", "*.down_proj"]})
    found = widths(report)
    for pattern in ("layers.0.self_attn.", "down_proj"):
        assert len({width for name, width in found.items() if pattern in name}) == 1
    assert len(set(found.values())) > 1


def test_a_recipe_reaches_the_second_budget(small: Any, compress: Callable[..., Any]) -> None:
    """Bit operations, 16 for each bit of a weight here: they allow fewer bits than the bytes do."""
    free, bound = (compress(small(), MIXED | table)[1] for table in ({}, {"operations_budget": 16 * 3.0}))
    told, wide = bound["allocation"], free["allocation"]
    count = bound["totals"]["weights"]
    assert told["budget_operations"] == 16 * 3 * count
    mean = sum(width * math.prod(bound["layers"][name]["shape"]) for name, width in widths(bound).items()) / count
    assert told["operations"] == 16 * mean * count <= told["budget_operations"]
    assert told["stored_bits"] < wide["stored_bits"]
    assert told["predicted"] > wide["predicted"]
    assert "operations" not in wide


def test_inputs_of_eight_bits_cost_half_the_operations() -> None:
    weight, seen = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), Statistics(curvature=1.0)
    costs = [hawq.Method().cost(weight, seen, hawq.Config(bits=4, activations=a)) for a in ("none", "int8")]
    assert [cost.operations for cost in costs] == [128 * 4 * 16, 128 * 4 * 8]


def test_an_encoder_of_mixed_widths_needs_our_loader_and_keeps_the_budget(
    small: Any, compress: Callable[..., Any]
) -> None:
    """Plain transformers unpacks an encoder while loading, by one scheme for all layers."""
    out, report = compress(small(family="encoder"), MIXED)
    assert is_private(out / "model")
    assert report["loads_with"] == "pipelines.modelio.load"
    assert report["totals"]["stored_bits"] <= report["allocation"]["budget_bits"]
    model, reader = load_model(out / "model"), WeightReader(out / "model")
    for name in widths(report):
        assert torch.equal(model.get_parameter(f"{name}.weight"), reader.dense(f"{name}.weight"))


def test_storage_of_lq_lora_is_shared_out_too(small: Any, compress: Callable[..., Any]) -> None:
    table = {"method": "lq_lora", "rank": 1, "samples": 4, "skip": ["model.layers.0.*", "*.self_attn.*"]}
    out, report = compress(small(), table | {"budget": 4.0})
    told = report["allocation"]
    assert told["stored_bits"] == report["totals"]["stored_bits"] <= told["budget_bits"]
    assert told["predicted"] <= told["uniform"]
    assert bool(torch.isfinite(load_model(out / "model")(input_ids=torch.arange(8)[None]).logits).all())


def test_without_a_budget_there_is_no_allocation(small: Any, compress: Callable[..., Any]) -> None:
    _, report = compress(small(), {"method": "hawq", "budget": 0, "bits": 3, "samples": 8})
    assert "allocation" not in report
    assert report["totals"]["bits_per_weight"] < 4


def test_a_budget_that_is_too_small_is_refused(small: Any, compress: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="within the budget"):
        compress(small(), MIXED | {"budget": 1.5})


def test_nothing_is_shared_out_without_a_budget(small: Any, opened: Any) -> None:
    run = opened(small(), {"method": "hawq"})
    for method, config in ((gptq.Method(), gptq.Config()), (hawq.Method(), hawq.Config(budget=0))):
        assignment = Assignment(method, config, sequential.targets(run.base, ()))
        assert bit_allocation.allocate(run, assignment) == bit_allocation.Allocated(assignment)


def test_costs_are_those_of_the_method_on_each_layer(small: Any, opened: Any) -> None:
    config = hawq.Config(sensitivity="hessian", widths=(3, 5))
    run = opened(small(), {"method": "hawq", "samples": 4})
    names, tokens = sequential.targets(run.base, ())[:4], torch.from_numpy(run.tokens_NT)
    wanted = hawq.Method().allocation(config)
    assert wanted is not None
    costs = bit_allocation.costs_of(run, Assignment(hawq.Method(), config, names), wanted)
    assert costs.weights == sum(run.reader.dense(f"{name}.weight").numel() for name in names)
    whole, seen = load_model(run.source), dict[str, torch.Tensor]()
    for name in names:
        whole.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].detach().flatten(0, -2).double()})
        )
    whole(input_ids=tokens)
    for row, name in enumerate(names):
        weight, moment = run.reader.dense(f"{name}.weight"), seen[name].T @ seen[name]
        for column, option in enumerate(wanted.options):
            cost = hawq.Method().cost(weight, Statistics(moment, len(seen[name])), option)
            assert costs.bits_LC[row, column] == cost.stored_bits
            assert costs.loss_LC[row, column] == pytest.approx(cost.loss, rel=1e-3)


# ---- the integer program against trying every allocation, and budgets that hold to the bit ----------------------


def random_problem(seed: int, layers: int = 6, choices: int = 4) -> tuple[Any, Any]:
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
    cost, bits = random_problem(seed)
    least, most = int(bits.min(1).sum()), int(bits.max(1).sum())
    budget = least + int(share * (most - least))
    chosen = bit_allocation.solve(cost, bits, budget)
    assert bit_allocation.total(bits, chosen) <= budget
    assert price(cost, chosen) == pytest.approx(brute(cost, bits, budget), rel=1e-9)


def test_one_bit_less_is_another_allocation() -> None:
    cost, bits = random_problem(0)
    chosen = bit_allocation.solve(cost, bits, 60000)
    size = bit_allocation.total(bits, chosen)
    assert bit_allocation.solve(cost, bits, size) == chosen
    other = bit_allocation.solve(cost, bits, size - 1)
    assert bit_allocation.total(bits, other) < size
    assert price(cost, other) > price(cost, chosen)


def test_a_budget_of_terabits_holds_to_the_bit() -> None:
    """At this size one part in 10^7, the solver's tolerance, is a hundred thousand bits."""
    cost, bits = random_problem(1, layers=40)
    large = bits * 10_000_019
    for share in (0.2, 0.5, 0.7):
        budget = int(large.min(1).sum() + share * (large.max(1).sum() - large.min(1).sum()))
        chosen = bit_allocation.solve(cost, large, budget)
        assert bit_allocation.total(large, chosen) <= budget
        assert bit_allocation.solve(cost, large, bit_allocation.total(large, chosen)) == chosen


@pytest.mark.parametrize("seed", range(3))
def test_a_second_budget_binds_as_well(seed: int) -> None:
    cost, bits = random_problem(seed)
    second = np.random.default_rng(seed + 50).integers(1, 100, bits.shape)
    budget, limit, rows = int(bits.max(1).sum() * 0.7), int(second.min(1).sum() * 1.3), np.arange(len(bits))
    chosen = bit_allocation.solve(cost, bits, budget, second=bit_allocation.Second(second, limit))
    expected = brute(cost, bits, budget, lambda found: second[rows, found].sum() <= limit)
    assert price(cost, chosen) == pytest.approx(expected, rel=1e-9)
    assert expected > brute(cost, bits, budget), "it binds"


@pytest.mark.parametrize("seed", range(3))
def test_layers_of_a_group_take_the_same_choice(seed: int) -> None:
    cost, bits = random_problem(seed)
    budget = int(bits.max(1).sum() * 0.5)
    chosen = bit_allocation.solve(cost, bits, budget, groups=[[0, 2, 5], [1, 4]])
    expected = brute(cost, bits, budget, lambda c: c[0] == c[2] == c[5] and c[1] == c[4])
    assert len({chosen[0], chosen[2], chosen[5]}) == len({chosen[1], chosen[4]}) == 1
    assert price(cost, chosen) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), layers=st.integers(1, 4), choices=st.integers(1, 4))
def test_it_is_the_best_for_any_problem(seed: int, layers: int, choices: int) -> None:
    cost, bits = random_problem(seed, layers, choices)
    budget = int(np.random.default_rng(seed).integers(bits.min(1).sum(), bits.max(1).sum() + 1))
    assert price(cost, bit_allocation.solve(cost, bits, budget)) == pytest.approx(brute(cost, bits, budget), rel=1e-9)


def test_hundreds_of_layers_are_solved() -> None:
    cost, bits = random_problem(3, layers=300)
    budget = int(bits.max(1).sum() * 0.45)
    chosen = bit_allocation.solve(cost, bits, budget)
    assert bit_allocation.total(bits, chosen) <= budget
    assert price(cost, chosen) < min(
        price(cost, bit_allocation.random_choice(bits, budget, seed)) for seed in range(20)
    )


def test_a_budget_below_the_smallest_choices_is_refused_with_their_size() -> None:
    cost, bits = random_problem(0)
    least = int(bits.min(1).sum())
    with pytest.raises(ConfigError, match=f"within the budget of {least - 1}") as error:
        bit_allocation.solve(cost, bits, least - 1)
    assert str(least) in str(error.value.hint)
    with pytest.raises(ConfigError, match="within the budget"):
        bit_allocation.random_choice(bits, least - 1, seed=0)


@pytest.mark.parametrize("seed", range(5))
def test_random_allocations_fill_the_budget_and_repeat_by_seed(seed: int) -> None:
    _, bits = random_problem(0)
    budget = int(bits.max(1).sum() * 0.6)
    chosen = bit_allocation.random_choice(bits, budget, seed)
    assert chosen == bit_allocation.random_choice(bits, budget, seed)
    assert bit_allocation.total(bits, chosen) <= budget
    for layer, choice in enumerate(chosen):
        larger = sorted(size for size in bits[layer] if size > bits[layer, choice])
        if larger:
            assert bit_allocation.total(bits, chosen) - bits[layer, choice] + larger[0] > budget


def test_random_allocations_differ() -> None:
    _, bits = random_problem(0)
    assert len({tuple(bit_allocation.random_choice(bits, 60000, seed)) for seed in range(8)}) > 5


@pytest.mark.parametrize("seed", range(5))
def test_the_uniform_arm_is_the_best_that_fits_even_where_a_larger_one_is_worse(seed: int) -> None:
    cost, bits = random_problem(seed)
    cost[:, 2] = cost[:, 0] + 1
    sizes = bits.sum(0)
    for budget in (int(sizes[2]), int(sizes[1]), int(sizes[2]) - 1, int(sizes.max())):
        fitting = [choice for choice in range(bits.shape[1]) if sizes[choice] <= budget]
        best = min(fitting, key=lambda choice: float(cost[:, choice].sum()))
        assert bit_allocation.uniform_choice(cost, bits, budget) == best
        assert best != 2
    assert bit_allocation.uniform_choice(cost, bits, int(sizes.min()) - 1) is None
