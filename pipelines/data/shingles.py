"""Runs of words as numbers: what repetition, similarity and contamination are measured on."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.data.clean import weight, words

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
_SHIFT = np.uint64(29)
_QUARTERS = 4
"""Quarters of a word that a whole word has."""
_BLOCK = 4096
_REMEMBERED = 300_000
"""Words that a process remembers the numbers of."""

Hashes = NDArray[np.uint64]
Number = TypeVar("Number", np.uint32, np.uint64)


@dataclass(frozen=True)
class Units:
    """The units of a text: see `clean.words`."""

    hashes: Hashes
    """One stable number per unit, [units]."""
    quarters: NDArray[np.int64] | None = None
    """How much of a word each unit is, in quarters, [units]; None where each is a whole word."""


def units_of(text: str) -> Units:
    """Return the units of a text."""
    return as_units(words(text), whole=text.isascii())


def as_units(found: Sequence[str], *, whole: bool = False) -> Units:
    """Return units as numbers.

    Args:
        found: what `clean.words` returned.
        whole: it is known that each is a whole word.
    """
    if whole:
        return Units(hash_words(found))
    _forget(_quarters_of)
    quarters = np.fromiter(map(_quarters_of.__getitem__, found), np.int64, len(found))
    return Units(hash_words(found), None if (quarters == _QUARTERS).all() else quarters)


def hash_words(words: Sequence[str]) -> Hashes:
    """Return one stable number per word (CRC-32), [words]."""
    _forget(_crc_of)
    return np.fromiter(map(_crc_of.__getitem__, words), dtype=np.uint64, count=len(words))


class _Remembered(dict[str, int]):
    """Remembers what a function said of a word: most words of a text were seen before."""

    def __init__(self, function: Callable[[str], int]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, word: str) -> int:
        self[word] = number = self._function(word)
        return number


_crc_of = _Remembered(lambda word: zlib.crc32(word.encode()))
_quarters_of = _Remembered(weight)


def _forget(remembered: _Remembered) -> None:
    if len(remembered) > _REMEMBERED:
        remembered.clear()


def distinct(numbers: NDArray[Number]) -> NDArray[Number]:
    """Return the distinct numbers, ascending; sorting is three times as fast as the hash table of `np.unique`."""
    ordered = np.sort(numbers)
    return ordered[np.concatenate((np.ones(min(len(ordered), 1), dtype=bool), ordered[1:] != ordered[:-1]))]


def hash_runs(hashes: Hashes, size: int) -> Hashes:
    """Return one number per run of `size` consecutive units, [units - size + 1]; a shorter text is one run.

    Args:
        hashes: what `hash_words` returned.
        size: units per run.
    """
    runs = max(len(hashes) - size + 1, 1)
    mixed = np.zeros(runs, dtype=np.uint64)
    for offset in range(min(size, len(hashes))):
        mixed = (mixed ^ hashes[offset : offset + runs]) * _MULTIPLIER
        mixed ^= mixed >> _SHIFT
    return mixed


def word_runs(units: Units, size: int) -> tuple[Hashes, NDArray[np.int64]]:
    """Return a number for each run of units as long as `size` words, and where each ends; a shorter text has none.

    A character of a script without spaces is less than a word (`clean.weight`), so that a run of 13 words is about as
    telling in Chinese (26 characters) and Thai (52) as in English. The number of a run is a polynomial of its units
    modulo 2**64, which costs the same for any length.

    Args:
        units: of one text.
        size: words a run.

    Returns:
        Numbers and ends, [runs] each: run i is the units i to ends[i] - 1.
    """
    count = len(units.hashes)
    if units.quarters is None:
        ends = np.arange(size, count + 1, dtype=np.int64)
    else:
        reached = np.concatenate(([0], np.cumsum(units.quarters)))
        ends = np.searchsorted(reached, reached[:-1] + _QUARTERS * size)
        ends = ends[ends <= count]
    runs = len(ends)
    if not runs:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    mixed = (units.hashes ^ (units.hashes << _SHIFT)) * _MULTIPLIER
    mixed ^= mixed >> _SHIFT
    sums = np.concatenate((np.zeros(1, dtype=np.uint64), np.cumsum(mixed * _powers(count, _MULTIPLIER))))
    numbers = (sums[ends] - sums[:runs]) * _powers(runs, _INVERSE)
    numbers ^= numbers >> np.uint64(32)
    numbers *= _MULTIPLIER
    return numbers ^ (numbers >> _SHIFT), ends


_known_powers: dict[int, Hashes] = {}


def _powers(count: int, base: np.uint64) -> Hashes:
    """Return base**0 .. base**(count - 1) modulo 2**64; those of an earlier call are used again."""
    known = _known_powers.get(int(base))
    if known is None or len(known) < count:
        size = -(-count // _BLOCK) * _BLOCK
        known = np.full(size, base, dtype=np.uint64)
        known[0] = 1
        known = _known_powers[int(base)] = np.cumprod(known, dtype=np.uint64)
    return known[:count]


def window_minima(runs: Hashes, window: int) -> Hashes:
    """Return the smallest number of every `window` consecutive runs, distinct and ascending: a winnowing.

    Two texts that share `window` consecutive runs share at least one of the numbers (Schleimer, Wilkerson and Aiken
    2003), and about 2 in `window + 1` runs are among them.
    """
    if not len(runs):
        return runs
    window = min(window, len(runs))
    smallest, width = runs, 1
    while 2 * width <= window:
        smallest = np.minimum(smallest[:-width], smallest[width:])
        width *= 2
    if width < window:
        smallest = np.minimum(smallest[: len(runs) - window + 1], smallest[window - width :])
    return distinct(smallest)
