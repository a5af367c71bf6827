"""Runs of words as numbers: equal for equal runs, different for different ones, the same on every machine."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.shingles import hash_runs, hash_words

WORDS = st.lists(st.sampled_from(["a", "b", "ab", "ba", "aa", ""]), max_size=40)


def tuples(words: list[str], size: int) -> list[tuple[str, ...]]:
    """The runs themselves; a shorter text is one run."""
    return [tuple(words[n : n + size]) for n in range(max(len(words) - size + 1, 1))]


@given(one=WORDS, other=WORDS, size=st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_two_runs_have_one_number_exactly_when_their_words_are_equal(
    one: list[str], other: list[str], size: int
) -> None:
    runs = [*tuples(one, size), *tuples(other, size)]
    numbers = [*hash_runs(hash_words(one), size), *hash_runs(hash_words(other), size)]
    assert len(runs) == len(numbers)
    for run, number in zip(runs, numbers, strict=True):
        same = [n for r, n in zip(runs, numbers, strict=True) if len(r) == len(run) and r == run]
        unlike = [n for r, n in zip(runs, numbers, strict=True) if len(r) == len(run) and r != run]
        assert all(n == number for n in same)
        assert number not in unlike


def test_the_order_of_words_counts() -> None:
    forwards, backwards = (hash_runs(hash_words(words), 3)[0] for words in (["x", "y", "z"], ["z", "y", "x"]))
    assert forwards != backwards


@pytest.mark.parametrize("size", [1, 5, 13])
def test_numbers_do_not_collide_in_a_million_runs(size: int) -> None:
    """CRC-32 of a word has 32 bits, but the mixed numbers of runs spread over 64: the birthday bound allows 3e-8."""
    words = np.arange(1_000_000, dtype=np.uint64)
    assert len(np.unique(hash_runs(words, size))) == 1_000_000 - size + 1


def test_numbers_are_those_of_another_process() -> None:
    """Python's own hash of a string differs from process to process; artifacts must not."""
    code = "from pipelines.data.shingles import *\nprint(hash_runs(hash_words(['to', 'be', 'or', 'not']), 3).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(hash_runs(hash_words(["to", "be", "or", "not"]), 3).tolist()), done.stderr
