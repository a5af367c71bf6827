"""Filters: documents too short, too long or too repetitive to learn from, each with the reason it is dropped for."""

from __future__ import annotations

from pipelines.data.config import PrepareConfig
from pipelines.data.shingles import Units, distinct, word_runs

NGRAM_WORDS = 10
"""Length of the runs of words whose repetition is measured."""


def reason_to_drop(text: str, units: Units, config: PrepareConfig) -> str | None:
    """Return why a cleaned document is dropped, or None when it is kept.

    Args:
        text: the cleaned text.
        units: of its normal form.
        config: the thresholds.
    """
    if len(text) < config.min_characters:
        return "too short"
    if len(text) > config.max_characters:
        return "too long"
    if repeated_lines(text) > config.max_repeated_lines:
        return "repeated lines"
    if repeated_ngrams(units) > config.max_repeated_ngrams:
        return "repeated n-grams"
    return None


def repeated_lines(text: str) -> float:
    """Return the share of the characters that lie in lines equal to an earlier line; blank lines do not count."""
    lines = [line for raw in text.split("\n") if (line := raw.strip())]
    total = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / total if total else 0.0


def repeated_ngrams(units: Units) -> float:
    """Return the share of the runs of `NGRAM_WORDS` words that equal an earlier run."""
    runs, _ = word_runs(units, NGRAM_WORDS)
    return 1 - len(distinct(runs)) / len(runs) if len(runs) else 0.0
