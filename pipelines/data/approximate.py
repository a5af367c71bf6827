"""Items of evaluations in running text, also where some of their words were changed.

Every item is a row of units (`clean.words`). Runs of three of them propose the place of an item in a document; the edit
distance of the whole item to that place decides (Myers 1999, in the arithmetic of Python's whole numbers). An item of
fewer than six units must stand there as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.data.shingles import Hashes, Units, hash_runs

TOLERANCE = 0.2
"""Edits of an item's words that are borne, as a share of them."""
TOLERANCE_OF_CHARACTERS = 0.3
"""The same where characters are units: one changed word is several of them."""
_SURVIVING = 0.3
"""Share of an item's runs of three units that must stand near each other before the item is compared with the place."""
_GRAM = 3
_EXACT_BELOW = 2 * _GRAM
_COMMON = 64
"""Items that may share a run of three units before it proposes none of them, where they have others."""


@dataclass(frozen=True)
class Hit:
    """An item found in a document."""

    item: int
    start: int
    """First unit, about."""
    end: int
    """Unit after the last one."""


class ItemIndex:
    """Finds items in documents.

    Args:
        units: of each item.
    """

    def __init__(self, units: Sequence[Units]) -> None:
        items = [each.hashes for each in units]
        self._items = [item.tolist() for item in items]
        self._allowed = [_allowed(each) for each in units]
        sizes = [_GRAM if len(item) >= _EXACT_BELOW else len(item) for item in items]
        self._tables = {
            size: _Grams(size, {n: items[n] for n in range(len(items)) if sizes[n] == size})
            for size in sorted(set(sizes))
        }

    def find(self, hashes: Hashes) -> list[Hit]:
        """Return the items that stand in a document of these units."""
        return [
            hit
            for table in self._tables.values()
            for item, starts in table.proposed(hashes, self._allowed)
            if (hit := self._verified(item, starts, hashes)) is not None
        ]

    def _verified(self, item: int, starts: NDArray[np.int64], hashes: Hashes) -> Hit | None:
        pattern, allowed = self._items[item], self._allowed[item]
        last = -1
        for start in np.unique(starts).tolist():
            if start <= last:
                continue
            low, last = max(start - allowed, 0), start + 2 * allowed
            window = hashes[low : last + len(pattern) + allowed].tolist()
            distance, end = best_match(pattern, window)
            if distance <= allowed:
                return Hit(item, max(low + end - len(pattern), 0), low + end)
        return None


def _allowed(item: Units) -> int:
    """Return the edits that are borne of an item."""
    count = len(item.hashes)
    if count < _EXACT_BELOW:
        return 0
    characters = item.quarters is not None and 2 * int((item.quarters < 4).sum()) > count
    return int((TOLERANCE_OF_CHARACTERS if characters else TOLERANCE) * count)


class _Grams:
    """The runs of one size of the items, each with the items and places where it stands."""

    def __init__(self, size: int, items: dict[int, Hashes]) -> None:
        self._size = size
        runs = [hash_runs(item, size) for item in items.values()]
        flat = np.concatenate(runs)
        owner = np.repeat(np.array(list(items), dtype=np.int64), [len(found) for found in runs])
        place = np.concatenate([np.arange(len(found)) for found in runs])
        _, inverse, times = np.unique(flat, return_inverse=True, return_counts=True)
        rare = times[inverse] <= _COMMON
        rare |= ~np.isin(owner, owner[rare])  # an item of common runs alone keeps them
        order = np.argsort(flat[rare], kind="stable")
        self._runs, self._owner, self._place = flat[rare][order], owner[rare][order], place[rare][order]
        self._grams = np.bincount(self._owner)

    def proposed(self, hashes: Hashes, allowed: Sequence[int]) -> list[tuple[int, NDArray[np.int64]]]:
        """Return items of which enough runs stand in a document, with the places where the items would begin."""
        if len(hashes) < self._size:
            return []
        runs = hash_runs(hashes, self._size)
        first, last = np.searchsorted(self._runs, runs), np.searchsorted(self._runs, runs, side="right")
        positions = np.flatnonzero(last > first)
        if not len(positions):
            return []
        sizes = (last - first)[positions]
        entries = np.repeat(first[positions] - np.concatenate(([0], np.cumsum(sizes)[:-1])), sizes) + np.arange(
            sizes.sum()
        )
        owners, starts = self._owner[entries], np.repeat(positions, sizes) - self._place[entries]
        different = np.bincount(self._owner[np.unique(entries)], minlength=len(self._grams))
        order = np.argsort(owners, kind="stable")
        owners, starts = owners[order], starts[order]
        names, edges = np.unique(owners, return_index=True)
        groups = zip(names.tolist(), np.split(starts, edges[1:]), strict=True)
        proposals = []
        for item, found in groups:
            least = max(int(_SURVIVING * self._grams[item]), 1)
            if different[item] >= least and len(near := _gathered(found, least, 2 * allowed[item])):
                proposals.append((item, near))
        return proposals


def _gathered(starts: NDArray[np.int64], least: int, span: int) -> NDArray[np.int64]:
    """Return the first of every `least` starts that lie within `span` of each other."""
    ordered = np.sort(starts)
    return ordered[: len(ordered) - least + 1][ordered[least - 1 :] - ordered[: len(ordered) - least + 1] <= span]


def best_match(pattern: Sequence[int], text: Sequence[int]) -> tuple[int, int]:
    """Return the least edit distance of a pattern to any part of a text, and where that part ends (the first such).

    Args:
        pattern: at least one number.
        text: numbers.
    """
    size = len(pattern)
    full, top = (1 << size) - 1, 1 << (size - 1)
    places: dict[int, int] = {}
    for number, symbol in enumerate(pattern):
        places[symbol] = places.get(symbol, 0) | 1 << number
    more, less, distance, best, end = full, 0, size, size, 0
    for number, symbol in enumerate(text, start=1):
        here = places.get(symbol, 0)
        across = here | less
        down = ((((here & more) + more) ^ more) | here) & full
        up = less | (full & ~(down | more))
        lower = more & down
        distance += bool(up & top) - bool(lower & top)
        if distance < best:
            best, end = distance, number
        up, lower = up << 1 & full, lower << 1 & full
        more, less = lower | (full & ~(across | up)), up & across
    return best, end
