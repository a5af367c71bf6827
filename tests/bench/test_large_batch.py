"""The grid of the large-batch bench: equal samples, the paper's rules, resumable, and a table that picks the best."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipelines.training import phases


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).with_name("large_batch.py")
    spec = importlib.util.spec_from_file_location("large_batch", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["large_batch"] = module
    spec.loader.exec_module(module)
    return module


def result(cell: Any, loss: float | None) -> dict[str, Any]:
    return {**vars(cell), "loss": loss}


@pytest.mark.parametrize("preset", ["cpu", "h200"])
def test_every_cell_shows_as_many_sequences_and_the_largest_batch_has_300_steps(bench: ModuleType, preset: str) -> None:
    cells = list(bench.first_seed(preset, "causal"))
    batches = bench.PRESETS[preset].batches
    assert {cell.steps * cell.batch for cell in cells} == {300 * batches[-1]}
    assert min(cell.steps for cell in cells) >= 300
    assert [large // small for small, large in itertools.pairwise(batches)] == [4] * (len(batches) - 1)
    assert batches[-1] >= 16 * batches[0]


def test_the_rate_grows_with_the_root_of_the_batch_and_the_warmup_share_with_the_batch(bench: ModuleType) -> None:
    small, large = (bench.Cell("cpu", "masked", "lamb", batch, 0.01, 0) for batch in (4, 64))
    assert large.rate == pytest.approx(4 * small.rate)
    assert large.warmup / large.steps == pytest.approx(16 * small.warmup / small.steps)
    settings = large.config()
    assert (settings.family, settings.optimizer.name, settings.batch_size) == ("encoder", "lamb", 64)
    peak = phases.phases_of(settings)[0].learning_rate(large.warmup - 1)
    assert peak == pytest.approx(large.rate)


def test_only_one_arm_clips(bench: ModuleType) -> None:
    clips = {name: bench.Cell("cpu", "causal", name, 4, 0.01, 0).config().optimizer.clip for name in bench.OPTIMIZERS}
    assert clips == {"lamb": None, "adamw": None, "adamw+clip": 1.0, "lars": None}


def test_what_is_finished_is_not_run_again_and_other_seeds_take_the_best_rate(bench: ModuleType) -> None:
    results: list[dict[str, Any]] = []
    first = list(bench.missing("cpu", ["causal"], results))
    assert len(first) == len(set(first)) == 4 * 3 * 3
    losses = {0.002: 3.0, 0.02: None}
    results += [result(cell, losses.get(cell.base_rate, 4.0)) for cell in first]
    rest = list(bench.missing("cpu", ["causal"], results))
    assert {cell.seed for cell in rest} == {1}
    assert {(cell.optimizer, cell.batch) for cell in rest} == {(c.optimizer, c.batch) for c in first}
    assert {cell.base_rate for cell in rest if cell.optimizer == "adamw"} == {0.002}
    assert 0.02 not in {cell.base_rate for cell in rest}
    results += [result(cell, 3.5) for cell in rest]
    assert list(bench.missing("cpu", ["causal"], results)) == []


def test_the_table_shows_the_best_rate_its_growth_and_what_the_rule_makes_of_it(bench: ModuleType) -> None:
    losses = {(4, 0.01): 2.0, (4, 0.02): 2.5, (16, 0.01): 2.1, (64, 0.01): 3.0, (64, 0.02): 2.2}
    cells = [(bench.Cell("cpu", "causal", "lamb", batch, rate, 0), loss) for (batch, rate), loss in losses.items()]
    results = [result(cell, loss) for cell, loss in cells]
    results.append(result(bench.Cell("cpu", "causal", "lamb", 4, 0.01, 1), 2.2))
    lamb, adamw, *_ = bench.rows(results, "cpu", "causal")
    assert lamb == ["lamb", "2.100 ± 0.100 (0.01)", "2.100 (0.01)", "2.200 (0.02)", "+4.8%", "3.000"]
    assert adamw[1:] == ["", "", "", "", ""]


def test_the_recorded_results_are_of_the_grid(bench: ModuleType) -> None:
    recorded = bench.read(bench.RESULTS)
    known = {
        (cell.task, cell.optimizer, cell.batch, cell.base_rate)
        for t in bench.TASKS
        for cell in bench.first_seed("cpu", t)
    }
    for row in recorded:
        assert (row["task"], row["optimizer"], row["batch"], row["base_rate"]) in known, json.dumps(row)
        assert row["steps"] * row["batch"] == 300 * 64


def test_a_finished_line_is_read_back_and_the_picture_is_drawn(bench: ModuleType, tmp_path: Path) -> None:
    cells = list(bench.first_seed("cpu", "causal"))[:6]
    lines = [json.dumps(result(cell, 3.0 + 0.1 * number)) for number, cell in enumerate(cells)]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    found = bench.read(tmp_path / "results.jsonl")
    assert [row["loss"] for row in found] == [json.loads(line)["loss"] for line in lines]
    bench.plot(found, "cpu", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
