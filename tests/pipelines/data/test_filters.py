"""Filters: each reason, its threshold from both sides, and a slow reference for the measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.config import PrepareConfig
from pipelines.data.filters import NGRAM_WORDS, reason_to_drop, repeated_lines, repeated_ngrams
from pipelines.data.shingles import Units, hash_words, units_of

CONFIG = PrepareConfig(min_characters=20, max_characters=4000)


def reason(text: str) -> str | None:
    return reason_to_drop(text, units_of(text), CONFIG)


def test_length_is_refused_just_outside_the_limits_and_kept_just_inside() -> None:
    assert reason("x" * 19) == "too short"
    assert reason("x" * 20) is None
    assert reason(unlike(4000)) is None
    assert reason(unlike(4001)) == "too long"


def test_a_text_of_repeated_lines_is_dropped_and_a_refrain_is_not() -> None:
    verses = [f"verse number {n} has words of its own {n * 7919}" for n in range(10)]
    assert reason("\n".join([*verses, "the same refrain", "the same refrain"])) is None
    assert reason("\n".join(verses[:3] * 5)) == "repeated lines"


def test_a_text_of_repeated_phrases_on_one_line_is_dropped() -> None:
    assert reason("all work and no play makes jack a dull boy today " * 30) == "repeated n-grams"


@given(st.lists(st.sampled_from(["one", "two", "three", "", "  one"]), max_size=30))
def test_repeated_lines_equals_counting_them(lines: list[str]) -> None:
    seen: set[str] = set()
    repeated = total = 0
    for line in (raw.strip() for raw in lines):
        total += len(line)
        repeated += len(line) if line in seen else 0
        seen.add(line)
    assert repeated_lines("\n".join(lines)) == pytest.approx(repeated / total if total else 0.0)


@given(st.lists(st.sampled_from("abc"), max_size=60))
def test_repeated_ngrams_equals_counting_them(letters: list[str]) -> None:
    runs = [tuple(letters[i : i + NGRAM_WORDS]) for i in range(len(letters) - NGRAM_WORDS + 1)]
    repeated = sum(run in runs[:i] for i, run in enumerate(runs))
    assert repeated_ngrams(Units(hash_words(letters))) == pytest.approx(repeated / len(runs) if runs else 0.0)


def test_nothing_of_a_real_text_is_dropped(make_documents: Callable[..., list[dict[str, Any]]]) -> None:
    texts = [record["text"] for record in make_documents(200)]
    assert {reason(text) for text in texts} == {None}


def unlike(length: int) -> str:
    return " ".join(str(n * n) for n in range(length))[:length]
