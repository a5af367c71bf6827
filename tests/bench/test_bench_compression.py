"""The criterion of the compression bench: no worse than 1 % in perplexity and no slower than a library."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def bench_module() -> ModuleType:
    """The bench script as a module."""
    path = Path(__file__).with_name("bench_compression.py")
    spec = importlib.util.spec_from_file_location("bench_compression", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("perplexity", "seconds", "holds"),
    [
        (1.0, [1.0, 1.0], True),
        (1.0, [1.09, 1.0], True),
        (1.0, [1.2, 1.0], False),
        (1.0, [0.035, 0.028], True),
        (1.0, [0.06, 0.028], False),
        (1.011, [0.5, 1.0], False),
        (1.009, [0.5, 1.0], True),
    ],
)
def test_a_row_fails_when_ours_is_worse_or_slower_than_noise_allows(
    bench_module: ModuleType, perplexity: float, seconds: list[float], holds: bool
) -> None:
    assert bench_module.holds({"perplexity": perplexity, "seconds": seconds}) is holds


def test_sides_take_turns_and_their_medians_count(bench_module: ModuleType) -> None:
    order: list[str] = []

    class Text:
        def loss(self, model: str) -> float:
            return {"mine": 0.5, "theirs": 0.0}[model]

    def side(name: str) -> object:
        def arm(*_place: object) -> str:
            order.append(name)
            return name

        return arm

    ratios, times = bench_module.compared((side("mine"), side("theirs")), ("rtn", 4, 0, Text()), 0.0, 3)
    assert order == ["mine", "theirs"] * 4
    assert ratios == pytest.approx([2.718281828**0.5, 1.0])
    assert len(times) == 2
    assert max(times) < 1.0
