"""Parameters layer by layer, for methods that share a budget of bits out among layers: those with an `allocation`."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from models.compression.base import BitAllocation, MethodConfig, Statistics, WeightMethod
from pipelines.compression import allocate, calibration, curvature, sensitivity
from pipelines.modelio import meta_init
from pipelines.modelio.folder import WeightReader

RANDOM_ARMS = 6


@dataclass(frozen=True)
class Plan:
    """What each layer was given, and what that was predicted to cost beside other allocations."""

    parameters: Mapping[str, MethodConfig] = field(default_factory=dict)
    """Layer name -> its parameters; layers that are missing take those of the child."""
    nulls: Mapping[str, Mapping[str, MethodConfig]] = field(default_factory=dict)
    """The same for other allocations within the budget, the null arms: a random one, and the best that is uniform."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """Goes into `compression.json`; empty where nothing was shared out."""


@dataclass(frozen=True)
class Shown:
    """What planning may look at."""

    tokens_NT: NDArray[np.int64]
    labels_NT: NDArray[np.int64]
    device: torch.device
    seed: int = 0
    fisher: Path | None = None
    """Folder that `gradients.record` has filled; for methods that price by gradients."""


@dataclass(frozen=True)
class Prices:
    """Bits and predicted loss of every choice for every layer."""

    names: Sequence[str]
    weights: int
    """Number of weights of all layers."""
    bits_LC: NDArray[np.int64]
    cost_LC: NDArray[np.float64]


def make(
    model: PreTrainedModel,
    reader: WeightReader,
    method: WeightMethod[Any],
    config: MethodConfig,
    *,
    names: Sequence[str],
    shown: Shown | None,
) -> Plan:
    """Return the allocation of least predicted loss within the budget.

    Raises:
        ConfigError: no allocation is within the budget.
    """
    allocation = method.allocation(config)
    if shown is None or allocation is None:
        return Plan()
    options: list[MethodConfig] = list(allocation.options)
    prices = price_all(model, reader, method, allocation, names=names, shown=shown)
    budget = int(allocation.budget * prices.weights)
    chosen = allocate.solve(prices.cost_LC, prices.bits_LC, budget, groups=_groups(prices.names, allocation))
    parameters = {name: options[choice] for name, choice in zip(prices.names, chosen, strict=True)}
    drawn = allocate.random_choice(prices.bits_LC, budget, 0)
    nulls = {"random allocation": {n: options[choice] for n, choice in zip(prices.names, drawn, strict=True)}}
    if (uniform := allocate.uniform_choice(prices.cost_LC, prices.bits_LC, budget)) is not None:
        nulls["uniform allocation"] = dict.fromkeys(prices.names, options[uniform])
    return Plan(parameters, nulls, _report(prices, chosen, budget, parameters))


def price_all(
    model: PreTrainedModel,
    reader: WeightReader,
    method: WeightMethod[Any],
    allocation: BitAllocation[Any],
    *,
    names: Sequence[str],
    shown: Shown,
) -> Prices:
    """Return what every choice costs every layer, block by block."""
    priced: dict[str, list[tuple[int, float]]] = {}
    weights = 0
    for name, seen in _statistics(model, reader, allocation, names=names, shown=shown):
        weight_OI = reader.dense(f"{name}.weight").float()
        weights += weight_OI.numel()
        costs = [method.cost(weight_OI, seen, option) for option in allocation.options]
        priced[name] = [(cost.stored_bits, cost.loss) for cost in costs]
    ordered = [priced[name] for name in names]
    bits_LC = np.array([[bits for bits, _ in row] for row in ordered], dtype=np.int64)
    return Prices(list(names), weights, bits_LC, np.array([[cost for _, cost in row] for row in ordered]))


def _statistics(
    model: PreTrainedModel,
    reader: WeightReader,
    allocation: BitAllocation[Any],
    *,
    names: Sequence[str],
    shown: Shown,
) -> Iterator[tuple[str, Statistics]]:
    """Yield each layer's statistics in the original model, one block after another."""
    if allocation.sensitivity_source == "curvature":
        found = curvature.traces(
            reader.folder,
            names,
            shown.tokens_NT,
            shown.labels_NT,
            probes=allocation.probes,
            seed=shown.seed,
            device=shown.device,
        )
        yield from ((name, Statistics(curvature=value)) for name, value in found.items())
    elif allocation.sensitivity_source == "gradients":
        assert shown.fisher is not None
        for index in range(len(meta_init.blocks(model)[1])):
            squares = sensitivity.read(shown.fisher, index)
            yield from ((name, Statistics(fisher_OI=squares[name])) for name in names if name in squares)
    else:
        yield from _second_moments(model, reader, names, shown)


def _second_moments(
    model: PreTrainedModel, reader: WeightReader, names: Sequence[str], shown: Shown
) -> Iterator[tuple[str, Statistics]]:
    stack, layers = meta_init.blocks(model)
    meta_init.load_rest(model, stack, reader, shown.device)
    prefix = calibration.enter(model, layers, shown.tokens_NT, shown.device)
    for index, block in enumerate(layers):
        place = f"{stack}.{index}"
        meta_init.load(block, place, reader, shown.device, model.dtype)
        chosen = {n: model.get_submodule(n) for n in names if n.startswith(f"{place}.")}
        linear = {n: m for n, m in chosen.items() if isinstance(m, nn.Linear)}
        yield from calibration.measure(block, linear, index, prefix).items()
        prefix.advance(index, block)
        meta_init.release(block)


def _groups(names: Sequence[str], allocation: BitAllocation[Any]) -> list[list[int]]:
    """Return the numbers of the layers that are tied, for each pattern that ties at least two."""
    patterns = allocation.tied_layers
    found = [[i for i, name in enumerate(names) if fnmatch.fnmatchcase(name, pattern)] for pattern in patterns]
    return [group for group in found if len(group) > 1]


def _report(
    prices: Prices, chosen: Sequence[int], budget: int, parameters: Mapping[str, MethodConfig]
) -> dict[str, Any]:
    """Return the allocation and its predicted loss beside random ones of the same budget and the best uniform one."""
    rows = np.arange(len(chosen))
    random = [allocate.random_choice(prices.bits_LC, budget, seed) for seed in range(RANDOM_ARMS)]
    uniform = allocate.uniform_choice(prices.cost_LC, prices.bits_LC, budget)
    return {
        "budget_bits": budget,
        "stored_bits": allocate.total(prices.bits_LC, chosen),
        "predicted": float(prices.cost_LC[rows, list(chosen)].sum()),
        "random": [float(prices.cost_LC[rows, arm].sum()) for arm in random],
        "uniform": None if uniform is None else float(prices.cost_LC[:, uniform].sum()),
        "layers": {name: config.model_dump(mode="json") for name, config in parameters.items()},
    }
