"""Witten-Bell counts against a slow reference with dictionaries, and as probability distributions."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from pipelines.evaluation import ngram
from pipelines.evaluation.ngram import WittenBell

V, BOS, EOS, PAD = 9, 0, 1, 2


def _rows(seed: int = 0, rows: int = 12, length: int = 20) -> np.ndarray:
    """Draw a skewed token stream with document boundaries in it."""
    generator = np.random.default_rng(seed)
    drawn = generator.choice(V, size=(rows, length), p=[0.05, 0.05, 0.02, 0.4, 0.2, 0.15, 0.1, 0.03, 0.0])
    return drawn.astype(np.int64)


class SlowWittenBell:
    """The recursion of the paper, word for word, over dictionaries."""

    def __init__(self, rows: np.ndarray, never: tuple[int, ...]) -> None:
        self.follow: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for row, n in itertools.product(rows.tolist(), (1, 2, 3)):
            for i in range(len(row) - n + 1):
                *history, token = row[i : i + n]
                if token not in never:
                    self.follow[tuple(history)][token] += 1

    def probability(self, history: tuple[int, ...], token: int) -> float:
        lower = self.probability(history[1:], token) if history else 1.0 / V
        seen = self.follow.get(history)
        if not seen:
            return lower
        return (seen[token] + len(seen) * lower) / (seen.total() + len(seen))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_equal_the_slow_recursion(order: int) -> None:
    rows = _rows()
    fast, slow = WittenBell(rows, V, never_predicted=(BOS, PAD)), SlowWittenBell(rows, (BOS, PAD))
    cases = np.array(list(itertools.product(range(V), repeat=3)), dtype=np.int64)
    found = fast.probabilities(cases[:, :2], cases[:, 2], order)
    expected = [slow.probability(tuple(case[3 - order : 2]), case[2]) for case in cases.tolist()]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_over_the_vocabulary_sum_to_one_after_every_history(order: int) -> None:
    """Seen and unseen histories alike; no outcome is impossible."""
    model = WittenBell(_rows(), V, never_predicted=(BOS, PAD))
    for history in itertools.product(range(V), repeat=2):
        found = model.probabilities(np.tile(history, (V, 1)), np.arange(V), order)
        assert found.sum() == pytest.approx(1.0, abs=1e-12)
        assert (found > 0).all()


def test_document_nats_score_each_token_after_the_two_boundary_tokens() -> None:
    rows = _rows()
    model, slow = WittenBell(rows, V, never_predicted=(BOS, PAD)), SlowWittenBell(rows, (BOS, PAD))
    document = [EOS, BOS, 3, 4, 3, 8, EOS]
    for order in (1, 2, 3):
        expected = -sum(
            math.log(slow.probability(tuple(document[i - order + 1 : i]), document[i])) for i in range(2, len(document))
        )
        found = ngram.document_nats(model, [np.array(document), np.array(document[:4])], order)
        assert found[0] == pytest.approx(expected, rel=1e-12)
        assert found[1] < found[0]


def test_a_higher_order_is_better_where_order_matters_and_not_where_it_does_not() -> None:
    """A periodic stream is certain from two tokens of history on; independent tokens are not helped by history."""
    periodic = np.tile(np.array([3, 4, 3, 5], dtype=np.int64), (50, 10))
    test = np.tile(np.array([3, 4, 3, 5], dtype=np.int64), 5)
    periodic_nats = [ngram.document_nats(WittenBell(periodic, V), [test], order)[0] for order in (1, 2, 3)]
    assert periodic_nats[0] > 1.5 * periodic_nats[1] > 10 * periodic_nats[2]
    model = WittenBell(_rows(0, 400), V)
    independent = [ngram.document_nats(model, list(_rows(1, 100)), order).sum() for order in (1, 2, 3)]
    assert independent[0] < independent[1] < independent[2]


def test_no_count_crosses_a_row() -> None:
    rows = np.array([[3, 4, 5], [6, 7, 8]], dtype=np.int64)
    model = WittenBell(rows, V)
    crossing, inside = model.probabilities(np.array([[4, 5], [3, 4]]), np.array([6, 5]), order=2)
    assert crossing == pytest.approx(model.probabilities(np.array([[4, 5]]), np.array([6]), order=1)[0])
    assert inside > 0.5


def test_an_order_beyond_three_or_a_vocabulary_too_large_for_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match="order 4"):
        WittenBell(_rows(), V, order=4)
    with pytest.raises(ValueError, match="not supported"):
        WittenBell(_rows(), 2**22, order=3)
    assert WittenBell(_rows(), 2**22, order=2).vocabulary == 2**22
