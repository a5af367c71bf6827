"""Sizes, durations and counts as text: short, rounded once, and never 1000 of a unit."""

from __future__ import annotations

import pytest

from pipelines.core import quantity


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (541_460, "541 kB"),
        (999_700, "1 MB"),
        (1_126_812, "1.13 MB"),
        (3e9, "3 GB"),
        (5e15, "5,000 TB"),
        (None, "-"),
    ],
)
def test_sizes_have_decimal_units(count: float | None, said: str) -> None:
    assert quantity.size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "0 s"),
        (0.5, "0.5 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (194, "3 min 14 s"),
        (299.4, "4 min 59 s"),
        (299.6, "5 min"),
        (3569, "59 min"),
        (3590, "1 h 0 min"),
        (7800, "2 h 10 min"),
        (None, "-"),
    ],
)
def test_durations_are_said_as_a_person_would(seconds: float | None, said: str) -> None:
    assert quantity.duration(seconds) == said


@pytest.mark.parametrize(("count", "said"), [(12, "12"), (999_600, "1M"), (12_700_000, "12.7M"), (None, "-")])
def test_counts_are_shortened(count: float | None, said: str) -> None:
    assert quantity.short(count) == said
