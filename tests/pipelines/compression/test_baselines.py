"""Arms: the grid that is nearest in bytes from above, the null arms of a method, and what a run reports of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.compression import rtn
from models.compression.base import Statistics
from models.compression.formats import int_grid
from pipelines.compression import baselines

SHAPES = [(24, 96), (24, 88), (88, 24), (7, 33)]


@pytest.mark.parametrize(("bits", "group"), list(itertools.product([2, 3, 4, 5, 8], [0, 64, 32, 8])))
def test_counted_bytes_are_those_of_the_packed_matrix(bits: int, group: int) -> None:
    for rows, columns in SHAPES:
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        packed = rtn.Method().compress(weight, Statistics(), rtn.Config(bits=bits, group_size=group, clip="max"))
        assert baselines.grid_bytes(rows, columns, bits, group) == packed.stored_bits() // 8, (rows, columns)


@pytest.mark.parametrize("share", [0.07, 0.1, 0.126, 0.2, 0.26])
def test_the_nearest_grid_is_the_smallest_that_is_not_smaller(share: float) -> None:
    """Against every grid, one by one."""
    shapes = [(64, 128), (128, 256)]
    stored = int(share * 4 * sum(rows * columns for rows, columns in shapes))
    found = baselines.nearest_grid(shapes, stored)
    assert found is not None

    def total(bits: int, group: int) -> int:
        return sum(baselines.grid_bytes(rows, columns, bits, group) for rows, columns in shapes)

    mine = total(found["bits"], found["group_size"])
    every = [total(bits, group) for bits in range(2, 9) for group in (0, 256, 128, 64, 32, 16, 8)]
    assert mine == min(size for size in every if size >= stored)
    assert rtn.Config.model_validate(found).bits == found["bits"]


def test_bytes_that_a_grid_has_exactly_are_given_to_it() -> None:
    assert baselines.nearest_grid([(64, 128)], baselines.grid_bytes(64, 128, 4, 32)) == {"bits": 4, "group_size": 32}


def test_no_grid_is_as_large_as_floats() -> None:
    assert baselines.nearest_grid([(64, 128)], 4 * 64 * 128) is None


def test_a_run_without_validation_documents_has_no_arms(small: Any, compress: Callable[..., Any]) -> None:
    _, report = compress(small(), {"method": "gptq", "arms_documents": 4})
    assert report["arms"] == {}


@pytest.mark.slow
def test_every_arm_is_measured_at_no_fewer_bytes_than_the_child(bench: Any, compress: Callable[..., Any]) -> None:
    """At three bits a row GPTQ beats rounding beyond the noise of the documents, on text that neither was shown."""
    _, report = compress(bench, {"method": "gptq", "bits": 3, "group_size": 0, "arms_documents": 8})
    made = report["arms"]
    assert set(made) == {"gptq", "rtn"}
    assert made["gptq"]["bytes"] == report["totals"]["layer_bytes"]
    assert made["rtn"]["bytes"] == made["gptq"]["bytes"], "the very same grid"
    assert made["gptq"]["ratio"]["high"] < made["rtn"]["ratio"]["low"]
    assert made["gptq"]["ratio"]["value"] > 1
    assert report["arms_measured"]["documents"] == 8
    assert report["arms_measured"]["scored_tokens"] > 2000


@pytest.mark.slow
def test_the_null_arm_of_a_method_is_measured_at_its_bytes(bench: Any, compress: Callable[..., Any]) -> None:
    """Masks at random ruin the model, the method's do not: the comparison tells them apart."""
    table = {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.5, "arms_documents": 4}
    _, report = compress(bench, table)
    made = report["arms"]
    assert {"magnitude", "random", "rtn", "gptq"} <= set(made)
    assert made["random"]["bytes"] == made["magnitude"]["bytes"] <= made["rtn"]["bytes"]
    assert made["magnitude"]["ratio"]["high"] < made["random"]["ratio"]["low"]


def test_a_null_method_stores_that_arm() -> None:
    from models.compression import wanda

    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    seen = Statistics(torch.eye(16, dtype=torch.float64), 16)
    config = wanda.Config()
    packed = baselines._Baseline(wanda.Method(), "random").compress(weight, seen, config)
    assert torch.equal(packed.dequantize(), wanda.Method().baselines(weight, seen, config)["random"].dequantize())
    assert int_grid.group_for(96, 64) == 32
