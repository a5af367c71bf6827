"""The recorded measurements stay within the bounds of what is predicted today; and the bench notices what is not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

RECORDED = Path(__file__).with_name("estimates_results.jsonl")


@pytest.fixture(scope="module")
def bench_module() -> ModuleType:
    """The bench, which is a program."""
    path = Path(__file__).with_name("bench_estimates.py")
    spec = importlib.util.spec_from_file_location("bench_estimates", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_measurement_is_predicted_within_the_bounds(bench_module: ModuleType) -> None:
    rows = [bench_module.compared(row) for row in bench_module.recorded(RECORDED)]
    assert {(row["model"], row["ranks"], row["zero"]) for row in rows} == {
        (model, ranks, zero) for model in bench_module.MODELS for ranks in (1, 2) for zero in range(4)
    }
    assert [bench_module.line(row) for row in rows if bench_module.outside(row)] == []


@pytest.mark.parametrize(
    ("memory", "time", "outside"),
    [
        (1.0, 1.0, False),
        (1.19, 0.71, False),
        (1.21, 1.0, True),
        (0.79, 1.0, True),
        (1.0, 1.31, True),
        (1.0, 0.69, True),
    ],
)
def test_a_prediction_is_outside_beyond_a_fifth_in_memory_or_three_tenths_in_time(
    bench_module: ModuleType, memory: float, time: float, outside: bool
) -> None:
    assert bench_module.outside({"memory": memory, "time": time}) is outside
