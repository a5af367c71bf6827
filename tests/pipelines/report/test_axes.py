"""Scales and ticks are exact and round; numbers read as people write them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.report import axes

FLOATS = st.floats(-1e12, 1e12)


@given(st.lists(FLOATS, min_size=1, max_size=20), st.booleans())
def test_every_value_lies_within_the_plot_and_order_is_kept(values: list[float], zero: bool) -> None:
    scale = axes.fit(values, 60, 500, zero=zero, pad=0.05)
    at = [scale(v) for v in sorted(values)]
    assert at == sorted(at)
    assert at[0] >= 60
    assert at[-1] <= 500


@given(st.floats(1e-9, 1e9), st.floats(1.0001, 1e9))
def test_ticks_lie_within_their_scale_and_rise(low: float, factor: float) -> None:
    for log in (False, True):
        scale = axes.fit([low, low * factor], 0, 100, log=log)
        ticks = scale.ticks()
        assert len(ticks) == len(set(ticks))
        assert ticks == sorted(ticks)
        assert len(ticks) <= 12


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (6.4, 6.9, [6.4, 6.5, 6.6, 6.7, 6.8, 6.9]), (-1, 1, [-1, -0.5, 0, 0.5, 1])],
)
def test_linear_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert axes.Scale(low, high, 0, 1).ticks() == pytest.approx(expected)


def test_logarithmic_ticks_are_powers_or_their_simple_parts() -> None:
    assert axes.Scale(1, 1e4, 0, 1, log=True).ticks() == pytest.approx([1, 10, 100, 1e3, 1e4])
    assert axes.Scale(1, 20, 0, 1, log=True).ticks() == pytest.approx([1, 2, 5, 10, 20])


def test_a_narrow_logarithmic_scale_has_ticks_too() -> None:
    assert len(axes.Scale(1.1, 1.9, 0, 1, log=True).ticks()) >= 3


@pytest.mark.parametrize("values", [[], [None], [math.nan, math.inf], [3.0], [0.0], [-2.0, -2.0], [1e-300]])
def test_a_scale_exists_for_any_values(values: list[float | None]) -> None:
    for log in (False, True):
        scale = axes.fit(values, 0, 100, log=log, pad=0.1)
        assert scale.low < scale.high
        assert 0 <= scale(scale.low) < scale(scale.high) <= 100


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (3.67199, 4, "3.672"),
        (0.0, 3, "0"),
        (1234.5, 3, "1,234"),
        (2.5e-8, 2, "2.5e-8"),
        (-0.25, 3, "-0.250"),
        (math.nan, 3, "nan"),
        (None, 3, axes.NONE),
    ],
)
def test_numbers_show_their_significant_digits(value: float | None, digits: int, expected: str) -> None:
    assert axes.number(value, digits) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0 B"), (999, "999 B"), (541_460, "541 kB"), (1_126_812, "1.13 MB"), (5e15, "5,000 TB"), (None, axes.NONE)],
)
def test_sizes_are_decimal(value: float | None, expected: str) -> None:
    assert axes.size(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.5, "0.50 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (194, "3 min 14 s"),
        (7800, "2 h 10 min"),
        (None, axes.NONE),
    ],
)
def test_durations_read_aloud(seconds: float | None, expected: str) -> None:
    assert axes.duration(seconds) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0, "0"), (0.02, "0.02"), (6000, "6000"), (20000, "20k"), (5e-6, "5e-6")]
)
def test_ticks_are_short(value: float, expected: str) -> None:
    assert axes.tick(value) == expected
