"""Baselines: the grid that is nearest in bytes from above, those of a method, and what a run reports of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from models.compression import registry, rtn, wanda
from models.compression.base import Statistics
from models.compression.modules.packed_linear import PackedLinear
from pipelines.compression import baselines, sequential
from pipelines.compression.sequential import Assignment, compress_blocks
from pipelines.core.artifact import Artifact
from pipelines.modelio import meta_init

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


def test_a_run_without_validation_documents_compares_nothing(small: Any, compress: Callable[..., Any]) -> None:
    _, report = compress(small(), {"method": "gptq", "baseline_documents": 4})
    assert "comparison" not in report


@pytest.mark.slow
def test_every_baseline_is_measured_at_no_fewer_bytes_than_the_variant(
    bench: Any, compress: Callable[..., Any]
) -> None:
    """At three bits a row GPTQ beats rounding beyond the noise of the documents, on text that neither was shown."""
    _, report = compress(bench, {"method": "gptq", "bits": 3, "group_size": 0, "baseline_documents": 8})
    compared = report["comparison"]
    mine, rtn = compared["variant"], compared["baselines"]["rtn"]
    assert set(compared["baselines"]) == {"rtn"}
    assert mine["bytes"] == report["totals"]["layer_bytes"]
    assert rtn["bytes"] == mine["bytes"], "the very same grid"
    assert mine["ratio"]["high"] < rtn["ratio"]["low"]
    assert rtn["versus_variant"]["low"] > 1
    assert mine["ratio"]["value"] > 1
    assert (compared["split"], compared["unit"], compared["items"]) == ("validation", "documents", 8)
    assert compared["scored_tokens"] > 2000


@pytest.mark.slow
def test_the_baseline_of_a_method_is_measured_at_its_bytes(bench: Any, compress: Callable[..., Any]) -> None:
    """Masks at random ruin the model, the method's do not: the comparison tells them apart."""
    table = {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.5, "baseline_documents": 4}
    _, report = compress(bench, table)
    mine, others = report["comparison"]["variant"], report["comparison"]["baselines"]
    assert {"random", "rtn", "gptq"} <= set(others)
    assert others["random"]["bytes"] == mine["bytes"] <= others["rtn"]["bytes"]
    assert mine["ratio"]["high"] < others["random"]["ratio"]["low"]


def test_a_baseline_as_a_method_stores_what_the_method_calls_so() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    seen = Statistics(torch.eye(16, dtype=torch.float64), 16)
    method, config = wanda.Method(), wanda.Config()
    packed = baselines.BaselineMethod(method, "random").compress(weight, seen, config)
    assert torch.equal(packed.dequantize(), method.baselines(weight, seen, config)["random"].dequantize())


def test_a_baseline_is_calibrated_as_if_it_were_the_only_one(
    prepared: Artifact, small: Any, compress: Callable[..., Any]
) -> None:
    """Quik rounds inputs: where its layers stayed in the base model, GPTQ beside it was calibrated behind them."""
    bench = replace(small(), prepare=prepared)
    shared = {"samples": 8, "baseline_documents": 4}
    _, quik = compress(bench, {"method": "quik", **shared})
    rows, gptq = quik["layers"].values(), quik["comparison"]["baselines"]["gptq"]
    grid = baselines.nearest_grid([row["shape"] for row in rows], sum(row["stored_bits"] for row in rows) // 8)
    _, alone = compress(bench, {"method": "gptq", **shared, **grid})
    assert gptq["ratio"] == alone["comparison"]["variant"]["ratio"]
    assert gptq["bytes"] == alone["totals"]["layer_bytes"]


def test_a_base_whose_compression_was_abandoned_is_as_it_was(small: Any, opened: Any) -> None:
    run = opened(small(), {"method": "quik", "samples": 4})
    assignment = Assignment(registry.weight("quik"), run.config.parameters, sequential.targets(run.base, ()))
    blocks = compress_blocks(run, assignment)
    next(blocks)
    assert any(isinstance(module, PackedLinear) for module in run.base.modules())
    blocks.close()
    assert not any(isinstance(module, PackedLinear) for module in run.base.modules())
    _, stack = meta_init.blocks(run.base)
    assert all(parameter.is_meta for parameter in stack.parameters())
