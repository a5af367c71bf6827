"""Token-count models with Witten-Bell backoff: what a model must beat to have learned more than local statistics.

    P(w | h) = (c(h, w) + T(h) P(w | h')) / (c(h) + T(h))

with c the counts, T(h) the number of distinct tokens seen after h, and h' the history without its oldest token; the
empty history backs off to the uniform distribution (Witten and Bell 1991, in the interpolated form of Chen and Goodman
1998). Order n looks at n - 1 tokens of history: order 1 is the unigram.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
MAX_ORDER = 3


@dataclass(frozen=True)
class _Level:
    """Counts of one order; an n-gram is one integer in base `vocabulary`, its last token the lowest digit."""

    grams: Ids
    """Distinct n-grams, sorted."""
    counts: Ids
    histories: Ids
    """Distinct histories, sorted."""
    totals: Ids
    """c(h) of each history."""
    types: Ids
    """T(h) of each history."""


class WittenBell:
    """Counts up to order 3 over token ids below `vocabulary`.

    Args:
        rows: sequences [sequences, length] of token ids, read in order; no n-gram crosses a row.
        vocabulary: number of token ids.
        never_predicted: ids that are not counted as outcomes (start of document, padding); they may be history.
        order: highest order that is counted.
    """

    def __init__(
        self, rows: Ids, vocabulary: int, *, never_predicted: Sequence[int] = (), order: int = MAX_ORDER
    ) -> None:
        if not 1 <= order <= MAX_ORDER or vocabulary**order > np.iinfo(np.int64).max:
            raise ValueError(f"order {order} with {vocabulary} tokens is not supported; valid: 1 to {MAX_ORDER}")
        self.vocabulary = vocabulary
        self._levels = [_count(rows, vocabulary, n, never_predicted) for n in range(1, order + 1)]

    def probabilities(self, history: Ids, targets: Ids, order: int) -> Floats:
        """Return P(target | history) under the model of this order.

        Args:
            history: tokens before each target [targets, order - 1 or more], the nearest last.
            targets: [targets].
            order: 1 to the highest counted order.
        """
        estimate = np.full(len(targets), 1.0 / self.vocabulary)
        for n, level in enumerate(self._levels[:order], start=1):
            context = _pack(history[:, history.shape[1] - (n - 1) :], self.vocabulary)
            estimate = _interpolate(level, context, context * self.vocabulary + targets, estimate)
        return estimate


def document_nats(model: WittenBell, documents: Iterable[Ids], order: int) -> Floats:
    """Return the negative log likelihood in nats of each document [documents].

    Args:
        model: the counts.
        documents: token ids of each document with the two boundary tokens that precede it in the train stream
            (end of the document before, start of this one); what follows them is scored.
        order: 1 to 3.
    """
    return np.array([-np.log(token_probabilities(model, ids, order)).sum() for ids in documents])


def token_probabilities(model: WittenBell, ids: Ids, order: int) -> Floats:
    """Return P(ids[i] | ids[:i]) for every i from 2 on [len(ids) - 2]."""
    return model.probabilities(np.stack([ids[:-2], ids[1:-1]], axis=1), ids[2:], order)


def _count(rows: Ids, vocabulary: int, order: int, never_predicted: Sequence[int]) -> _Level:
    length = rows.shape[1] - order + 1
    grams = _pack(np.stack([rows[:, i : i + length] for i in range(order)], axis=-1), vocabulary).ravel()
    grams = grams[~np.isin(grams % vocabulary, np.asarray(never_predicted, dtype=np.int64))]
    distinct, counts = np.unique(grams, return_counts=True)
    histories, start, types = np.unique(distinct // vocabulary, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, start) if len(counts) else counts
    return _Level(distinct, counts, histories, totals, types)


def _pack(tokens: Ids, vocabulary: int) -> Ids:
    """Write the last axis as one integer; an empty axis gives zero."""
    packed = np.zeros(tokens.shape[:-1], dtype=np.int64)
    for i in range(tokens.shape[-1]):
        packed = packed * vocabulary + tokens[..., i]
    return packed


def _interpolate(level: _Level, context: Ids, gram: Ids, lower: Floats) -> Floats:
    total = _look_up(level.histories, level.totals, context)
    types = _look_up(level.histories, level.types, context)
    seen = total > 0
    count = _look_up(level.grams, level.counts, gram)
    return np.where(seen, (count + types * lower) / np.where(seen, total + types, 1), lower)


def _look_up(keys: Ids, values: Ids, wanted: Ids) -> Ids:
    """Return the value of each wanted key, 0 where it is absent."""
    if not len(keys):
        return np.zeros_like(wanted)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
