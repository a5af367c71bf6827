"""Passages: text that stands in several documents, found by runs of words and cut out by whole sentences or lines.

A text is a row of segments: lines, and sentences within a line. What is cut is segments, never a part of one, so what
stays reads as it was written.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import regex
from numpy.typing import NDArray

from pipelines.data.clean import words
from pipelines.data.records import Document
from pipelines.data.shingles import Hashes, Units, distinct, units_of, window_minima, word_runs

_SEGMENT = regex.compile(
    r"[^\n]*?(?:\n+|[.!?\u0964\u06d4]+[\"'\u2019\u201d)\]]*[ \t]+|[\u3002\uff01\uff1f\uff0e]+[\u300d\u300f\u201d]*|$)"
)
_BLANK_LINES = regex.compile(r"\n{3,}")


@dataclass(frozen=True)
class Cut:
    """A text in two parts."""

    kept: str
    removed: list[str]
    """Neighbouring segments joined."""


def segments(text: str) -> list[str]:
    """Return the lines and sentences of a text, their ends and the blanks behind them included; joined they are it."""
    return [piece for piece in _SEGMENT.findall(text) if piece]


def cut(text: str, hit: NDArray[np.bool_], *, whole: bool) -> Cut:
    """Cut the segments that hold marked units.

    Args:
        text: cleaned.
        hit: which of its units (`clean.words`) are marked, [units].
        whole: cut only segments of which every unit is marked; else all that hold one.
    """
    kept: list[str] = []
    removed: list[str] = []
    start, open_removal = 0, False
    for segment in segments(text):
        size = len(words(segment))
        marked = hit[start : start + size]
        start += size
        gone = bool(size) and bool(marked.all() if whole else marked.any())
        if gone and open_removal:
            removed[-1] += segment
        elif gone:
            removed.append(segment)
        elif not (open_removal and not segment.strip()):
            kept.append(segment)
        open_removal = gone or (open_removal and not size)
    return Cut(_BLANK_LINES.sub("\n\n", "".join(kept)), removed)


def covered(count: int, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of `count` units lie in one of the runs from `starts` to `ends`."""
    change = np.zeros(count + 1, dtype=np.int64)
    np.add.at(change, starts, 1)
    np.add.at(change, ends, -1)
    return np.cumsum(change[:-1]) > 0


class Known:
    """A set of numbers, ascending in one array: 8 bytes each."""

    def __init__(self, numbers: Hashes) -> None:
        self.numbers = numbers

    def places(self, wanted: Hashes) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return where each wanted number stands or would stand, and whether it is there."""
        if not len(self.numbers):
            return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
        places = np.searchsorted(self.numbers, wanted)
        places[places == len(self.numbers)] = 0
        return places, self.numbers[places] == wanted


# ---- passages that an earlier document holds -----------------------------------------------------------------------


def fingerprints(units: Units, size: int, scope: str) -> Hashes:
    """Return numbers of a text of which two texts share one if they share a passage of `size` words: a winnowing.

    Args:
        units: of the text.
        size: words of a passage.
        scope: texts of different scopes share none.
    """
    part = (size + 1) // 2
    runs, _ = word_runs(units, part)
    return window_minima(runs ^ _salt(scope), size - part + 1)


class Repeated:
    """Finds and cuts passages that an earlier document holds, in two passes over the documents.

    Args:
        size: words of a passage.
        by_source: whether only documents of one source are compared.
        suspects: numbers (`fingerprints`) that at least two documents have.
    """

    def __init__(self, size: int, *, by_source: bool, suspects: Known) -> None:
        self._size, self._by_source = size, by_source
        self._suspects = suspects
        self._repeated = Known(np.zeros(0, dtype=np.uint64))
        self._seen = np.zeros(0, dtype=bool)

    def learn(self, documents: Iterable[Document]) -> None:
        """Find out which passages several of the documents hold."""
        numbers = of_several(distinct(self._runs(document).numbers) for document in documents)
        self._repeated, self._seen = Known(numbers), np.zeros(len(numbers), dtype=bool)

    def cut(self, document: Document) -> Cut | None:
        """Return a document without passages that one before it holds; None where it holds none."""
        runs = self._runs(document)
        places, repeated = self._repeated.places(runs.numbers)
        again = repeated.copy()
        again[repeated] = self._seen[places[repeated]]
        self._seen[places[repeated]] = True
        if not again.any():
            return None
        result = cut(document.text, covered(runs.units, runs.starts[again], runs.ends[again]), whole=True)
        return result if result.removed else None

    def _runs(self, document: Document) -> _Runs:
        """Return the runs of a document that may stand in another one."""
        units = units_of(document.text)
        salt = _salt(document.source if self._by_source else "")
        count = len(units.hashes)
        parts, part_ends = word_runs(units, (self._size + 1) // 2)
        suspect = self._suspects.places(parts ^ salt)[1]
        near = covered(count, np.flatnonzero(suspect), part_ends[suspect])
        reached = np.concatenate(([0], np.cumsum(near)))
        numbers, ends = word_runs(units, self._size)
        starts = np.flatnonzero(reached[ends] > reached[: len(ends)])
        return _Runs(numbers[starts] ^ salt, starts, ends[starts], count)


@dataclass(frozen=True)
class _Runs:
    numbers: Hashes
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    units: int
    """Of the document."""


def _salt(scope: str) -> np.uint64:
    return np.uint64(zlib.crc32(scope.encode()) * 0x1_0000_0001 if scope else 0)


def of_several(numbers: Iterator[Hashes]) -> Hashes:
    """Return the numbers that stand in more than one of the arrays, each of which has distinct ones; ascending."""
    everything = np.sort(np.concatenate([np.zeros(0, dtype=np.uint64), *numbers]))
    return distinct(everything[1:][everything[1:] == everything[:-1]])
