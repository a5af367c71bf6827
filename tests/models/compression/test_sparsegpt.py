"""SparseGPT against a slow, obvious OBS, and against masks without compensation in the same storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.compression import sparsegpt
from models.compression.base import Statistics, relative_error
from models.compression.formats import sparse
from models.compression.solvers import obs

EXACT = {"value_bits": 32, "storage": "bitmask"}


def reference(weight_OI: Tensor, seen: Statistics, config: sparsegpt.Config) -> Tensor:
    """One column at a time; the inverse Hessian of the free columns is computed anew at every step and for salience."""
    assert seen.hessian_II is not None
    hessian = obs.damped(seen.hessian_II, seen.tokens, config.damp)
    weight = weight_OI.double().clone()
    columns = weight.shape[1]
    size = config.run[1] if config.run else config.block
    mask = torch.ones_like(weight, dtype=torch.bool)
    for column in range(columns):
        if column % size == 0:
            inside = range(column, min(column + size, columns))
            leading = [float(hessian[i:, i:].inverse()[0, 0]) for i in inside]
            salience = weight[:, inside].square() / torch.tensor(leading)
            if config.run:
                lowest = salience.argsort(1)[:, : size - config.run[0]]
                mask[:, inside] = torch.ones_like(salience, dtype=torch.bool).scatter(1, lowest, value=False)
            else:
                flat = torch.ones(salience.numel(), dtype=torch.bool)
                flat[salience.flatten().argsort()[: round(config.sparsity * salience.numel())]] = False
                mask[:, inside] = flat.view(salience.shape)
        inverse = hessian[column:, column:].inverse()
        removed = weight[:, column] * ~mask[:, column]
        weight[:, column:] -= torch.outer(removed / inverse[0, 0], inverse[0])
    return weight * mask


@pytest.mark.parametrize(
    "table",
    [{}, {"sparsity": 0.7}, {"block": 8}, {"block": 12, "sparsity": 0.3}, {"pattern": "2:4"}, {"pattern": "4:8"}],
    ids=str,
)
def test_it_is_the_algorithm_of_the_paper(table: dict[str, Any], layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=5, columns=32)
    config = sparsegpt.Config(**EXACT, **table)
    found = sparsegpt.Method().compress(weight, seen, config).dequantize().double()
    assert torch.allclose(found, reference(weight, seen, config), atol=1e-5)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("storage", [EXACT, {}, {"value_bits": 4}, {"value_bits": 8, "storage": "bitmask"}])
def test_compensation_beats_every_mask_without_it_at_the_same_bytes(
    pattern: Any, storage: dict[str, Any], layer: Callable[..., Any]
) -> None:
    weight, _, seen = layer(rows=48, columns=128, tokens=900)
    config = sparsegpt.Config(pattern=pattern, **storage)
    mine, arms = sparsegpt.Method().compress(weight, seen, config), sparsegpt.Method().baselines(weight, seen, config)
    assert {p.stored_bits() for p in arms.values()} == {mine.stored_bits()}
    errors = {name: relative_error(weight, p.dequantize(), seen.hessian_II) for name, p in arms.items()}
    error = relative_error(weight, mine.dequantize(), seen.hessian_II)
    assert error < 0.9 * errors["wanda"]
    assert errors["wanda"] < errors["magnitude"] < errors["random"]


def test_the_gain_holds_on_inputs_it_never_saw(layer: Callable[..., Any]) -> None:
    weight, inputs, _ = layer(rows=48, columns=64, tokens=2000)
    shown, held = inputs[:1000].double(), inputs[1000:].double()
    seen, config = Statistics(shown.T @ shown, 1000), sparsegpt.Config()
    mine, arms = sparsegpt.Method().compress(weight, seen, config), sparsegpt.Method().baselines(weight, seen, config)
    error, base = (relative_error(weight, p.dequantize(), held.T @ held) for p in (mine, arms["wanda"]))
    assert error < 0.95 * base


def test_codes_absorb_the_rounding_error_as_well(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=48)
    exact = sparsegpt.Method().compress(weight, seen, sparsegpt.Config(**EXACT)).dequantize()
    joint = sparsegpt.Method().compress(weight, seen, sparsegpt.Config(value_bits=4)).dequantize()
    mask = joint != 0
    rounded = sparse.pack(exact, exact != 0, sparsegpt.Config(value_bits=4)).dequantize()
    assert bool((exact != 0)[mask].all()), "the mask is the one of the first pass"
    error, base = (relative_error(weight, dense, seen.hessian_II) for dense in (joint, rounded))
    assert error < base


@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_a_pattern_holds_in_every_run(pattern: Any, kept: int, of: int, layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    dense = sparsegpt.Method().compress(weight, seen, sparsegpt.Config(pattern=pattern)).dequantize()
    assert bool(((dense != 0).reshape(-1, of).sum(1) <= kept).all())


def test_rows_that_a_pattern_does_not_fit_are_refused(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(columns=18)
    with pytest.raises(ValueError, match="2:4 pattern does not fit rows of 18"):
        sparsegpt.Method().compress(weight, seen, sparsegpt.Config(pattern="2:4"))


def test_without_correlations_survivors_keep_their_values(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer()
    dense = sparsegpt.Method().compress(weight, Statistics(torch.eye(64), 10), sparsegpt.Config(**EXACT)).dequantize()
    assert torch.allclose(dense[dense != 0], weight[dense != 0])
    assert weight[dense == 0].abs().max() < weight[dense != 0].abs().min()


def test_calibration_is_required() -> None:
    with pytest.raises(ValueError, match="sparsegpt needs calibration"):
        sparsegpt.Method().compress(torch.randn(2, 4), Statistics(), sparsegpt.Config())
