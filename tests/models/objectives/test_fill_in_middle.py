"""Documents turned around: nothing is lost but the two tokens that give way, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.objectives.base import IGNORED, ObjectiveContext
from models.objectives.causal import next_tokens
from models.objectives.fill_in_middle import FillingConfig, Objective, turned

BOS, EOS, PAD, MASK = 0, 1, 2, 3


def objective(rate: float = 1.0, seed: int = 5) -> Objective:
    return Objective(ObjectiveContext(seed, 500, BOS, EOS, PAD, MASK), FillingConfig(rate=rate))


def restored(tokens: list[int]) -> list[int]:
    """Return the text of a document that was turned around, in the order that it was written in."""
    inside = tokens[1:-1]
    one = inside.index(MASK)
    other = inside.index(MASK, one + 1)
    return inside[:one] + inside[other + 1 :] + inside[one + 1 : other]


@given(text=st.lists(st.integers(4, 499), min_size=3, max_size=30), data=st.data())
def test_prefix_middle_and_suffix_are_those_of_the_document(text: list[int], data: Any) -> None:
    first = data.draw(st.integers(0, len(text) - 2))
    last = data.draw(st.integers(first, len(text) - 2))
    made = turned(np.array([BOS, *text, EOS]), first, last, MASK).tolist()
    expected = [BOS, *text[:first], MASK, *text[last:-2], MASK, *text[first:last], EOS]
    assert made == expected
    assert restored(made) == text[:-2]


ROW = [BOS, *range(10, 30), EOS, BOS, *range(40, 52), EOS, BOS, 60, 61, EOS, PAD, 70, 71, 72, 73, PAD, PAD]
"""Two documents, one too short to be turned around, and the rest of one."""


def test_whole_documents_are_turned_around_and_everything_else_stays() -> None:
    rows = np.array([ROW] * 20)
    inputs, targets = objective().targets(rows, np.arange(20), np.zeros(20, dtype=np.int64))
    assert (inputs[:, 36:] == rows[:, 36:]).all(), "the short one, the rest of one, and padding"
    for row in inputs.tolist():
        assert restored(row[:22]) == list(range(10, 28))
        assert restored(row[22:36]) == list(range(40, 50))
    assert (targets == next_tokens(inputs, bos_id=BOS, pad_id=PAD)).all()
    assert (targets[:, 21] == IGNORED).all(), "the start of the next document is not asked for"
    assert len({tuple(row) for row in inputs.tolist()}) == 20, "each sample is cut elsewhere"


def test_every_middle_is_about_as_likely() -> None:
    rows, count = np.array([[BOS, 10, 11, 12, 13, 14, EOS]] * 3000), 3000
    inputs, _ = objective().targets(rows, np.arange(count), np.zeros(count, dtype=np.int64))
    ways, found = np.unique(inputs, axis=0, return_counts=True)
    assert len(ways) == 10, "two of four places, equal ones too"
    assert found.min() > 120, "1 / 16 of 3000 for an empty middle, twice as often for others"


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_rate_is_the_share_of_documents(rate: float) -> None:
    rows, count = np.array([[BOS, *range(10, 20), EOS] * 2] * 800), 800
    inputs, _ = objective(rate).targets(rows, np.arange(count), np.zeros(count, dtype=np.int64))
    halves = inputs.reshape(-1, 12)
    assert (halves == MASK).any(axis=1).mean() == pytest.approx(rate, abs=0.04)
    assert set((halves == MASK).sum(axis=1).tolist()) <= {0, 2}


def test_another_epoch_and_another_seed_cut_elsewhere() -> None:
    rows, zeros = np.array([ROW] * 8), np.zeros(8, dtype=np.int64)
    first = objective().targets(rows, np.arange(8), zeros)[0]
    assert (first == objective().targets(rows, np.arange(8), zeros)[0]).all()
    assert (first != objective().targets(rows, np.arange(8), zeros + 1)[0]).any()
    assert (first != objective(seed=6).targets(rows, np.arange(8), zeros)[0]).any()
