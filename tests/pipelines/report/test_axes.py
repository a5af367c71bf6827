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
    ("value", "expected"), [(0.0, "0"), (0.02, "0.02"), (6000, "6000"), (20000, "20k"), (5e-6, "5e-6")]
)
def test_ticks_are_short(value: float, expected: str) -> None:
    assert axes.tick(value) == expected


def test_a_broken_axis_keeps_close_values_apart_beside_far_ones() -> None:
    """Three models within a hundredth, baselines at twice their value: the models still get a third of the axis."""
    models = [(value - 0.004, value, value + 0.004) for value in (2.210, 2.215, 2.220)]
    scale = axes.fit_broken(models, 400.0, 0.0, far=[2.579, 2.942, 4.5])
    assert isinstance(scale, axes.Broken)
    pixels = [scale(v) for v in (2.206, 2.210, 2.215, 2.220, 2.224, 2.579, 2.942, 4.5)]
    assert pixels == sorted(pixels, reverse=True), "higher values stand higher, across the break too"
    assert pixels[1] - pixels[3] > 400 / 3
    assert all(0 <= scale(mark) <= 400 for mark in scale.ticks())
    assert max(scale.ticks()) > 2.224 > min(scale.ticks())


def test_a_model_far_above_the_others_stands_above_the_break() -> None:
    models = [(value, value, value) for value in (1.0001, 1.0003, 1.4)]
    scale = axes.fit_broken(models, 400.0, 0.0)
    assert isinstance(scale, axes.Broken)
    assert scale.lower.high < 1.4 <= scale.upper.high
    assert scale(1.0001) - scale(1.0003) > 400 / 3


@pytest.mark.parametrize(
    ("models", "far"),
    [
        ([], []),
        ([2.0], []),
        ([2.0, 2.1, 2.2], [2.3]),
        ([math.nan, 2.0], [math.nan]),
        ([2.0, 2.0], [3.0]),
        ([1.0, 5.0], []),
    ],
)
def test_an_axis_is_broken_only_where_it_helps(models: list[float], far: list[float]) -> None:
    shown = [(value, value, value) for value in models if not math.isnan(value)]
    scale = axes.fit_broken(shown, 400.0, 0.0, far=far)
    assert all(0 <= scale(value) <= 400 for value in (*models, *far) if not math.isnan(value))
    assert isinstance(scale, axes.Broken) == (models == [2.0, 2.0])


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (1.000112, 1.000078, 1.000143, ["1.00011", "1.00008", "1.00014"]),
        (1.05, 1.04, 1.06, ["1.050", "1.040", "1.060"]),
        (0.9999951, 0.99999, 0.999999, ["0.999995", "0.999990", "0.999999"]),
        (1.0, 1.0, 1.0, ["1.000", "1.000", "1.000"]),
        (2.5, 0.5, 7.5, ["2.500", "0.500", "7.500"]),
    ],
)
def test_a_ratio_has_the_digits_that_tell_it_from_one(
    value: float, low: float, high: float, expected: list[str]
) -> None:
    assert [axes.ratio(value, low, high), axes.ratio(low, value, high), axes.ratio(high, low, value)] == expected
    assert axes.ratio(None) == axes.NONE
