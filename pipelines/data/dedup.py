"""Duplicates: MinHash signatures propose pairs, the shingles themselves decide, and the longest document stays.

Two documents are near-duplicates when the Jaccard similarity of their sets of shingles reaches a threshold. MinHash
signatures (Broder 1997) and locality-sensitive banding propose pairs; the similarity of a proposed pair is then
computed on all shingles of both texts.

Documents are looked at from the longest to the shortest, the earlier one first among equals. One is dropped if a
document *that stays* is similar enough, so every dropped document has such a partner, and a chain of small changes
drops nothing that is unlike all that stays. A longer text is preferred because it is more often the whole of which the
other is an excerpt.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.data.records import Document
from pipelines.data.shingles import distinct, hash_runs

_RECALL = 0.98
"""Least probability with which the bands propose a pair whose similarity is just the threshold."""
_DEVIATIONS = 3.0
"""Standard deviations by which a signature may underestimate the similarity before a pair is not looked at."""
_COMPARED = 4096
"""Documents of equal bands that one is compared with at most: bounds the time where thousands share a template."""
_BLOCK = 4096
"""Shingles that are permuted at a time."""
_PAIRS = 12
_EXCERPT = 240
"""Characters of a sample."""

Signatures = NDArray[np.uint32]
"""[documents, permutations]."""
Shingles = NDArray[np.uint32]
"""Distinct shingles of a document, ascending."""


def shingles(hashes: NDArray[np.uint64], size: int) -> Shingles:
    """Return the distinct runs of `size` units of a text, ascending; a shorter text is one run.

    Args:
        hashes: `hashes` of `shingles.units_of`.
        size: units per shingle.
    """
    return distinct((hash_runs(hashes, size) >> np.uint64(32)).astype(np.uint32))


def signature(found: Shingles, *, permutations: int, seed: int) -> Signatures:
    """Return the MinHash signature of a document, uint32 [permutations].

    Args:
        found: what `shingles` returned for the document.
        permutations: length of the signature.
        seed: seed of the permutations.
    """
    factors, terms = _permutations(permutations, seed)
    smallest = np.full(permutations, np.iinfo(np.uint32).max, dtype=np.uint32)
    for start in range(0, len(found), _BLOCK):
        permuted = factors * found[start : start + _BLOCK] + terms
        np.minimum(smallest, permuted.min(axis=1), out=smallest)
    return smallest


@functools.cache
def _permutations(count: int, seed: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return odd factors and terms of affine permutations modulo 2**32, [count, 1] each.

    Shingles are well mixed hashes already, so that these permutations are as good as random ones.
    """
    rng = np.random.default_rng(seed)
    factors, terms = rng.integers(0, 1 << 32, (2, count, 1), dtype=np.uint32)
    return factors | np.uint32(1), terms


class ShingleFile:
    """The shingles of many documents in one file, read a document at a time.

    Args:
        path: uint32 numbers, one document after the other.
        sizes: shingles of each document.
    """

    def __init__(self, path: Path, sizes: list[int]) -> None:
        self._offsets = np.concatenate(([0], np.cumsum(np.asarray(sizes, dtype=np.int64)))).astype(np.int64)
        self._values: NDArray[np.uint32] = (
            np.memmap(path, dtype=np.uint32, mode="r") if self._offsets[-1] else np.zeros(0, dtype=np.uint32)
        )

    def __getitem__(self, document: int) -> Shingles:
        return np.asarray(self._values[self._offsets[document] : self._offsets[document + 1]])


def jaccard(one: Shingles, other: Shingles) -> float:
    """Return the Jaccard similarity of two sets of shingles."""
    if len(one) > len(other):
        one, other = other, one
    places = np.searchsorted(other, one)
    places[places == len(other)] = 0
    shared = int((other[places] == one).sum())
    return shared / (len(one) + len(other) - shared)


@dataclass(frozen=True)
class NearDuplicates:
    """Which documents are dropped, and for which."""

    kept: list[int]
    """Document -> the document that stays in its place, itself where it has no near-duplicate that stays."""
    similarity: dict[int, float]
    """Dropped document -> its similarity with the one that stays."""


def near_duplicates(
    signatures: Signatures, texts: ShingleFile, lengths: list[int], similarity: float
) -> NearDuplicates:
    """Return which documents are near-duplicates of one that stays.

    Args:
        signatures: of all documents.
        texts: their shingles.
        lengths: their lengths; the longest of a set of near-duplicates stays.
        similarity: least Jaccard similarity of near-duplicates.
    """
    kept, found = list(range(len(lengths))), {}
    members, buckets = _buckets(signatures, rows_per_band(similarity, signatures.shape[1]))
    row_of = {int(document): row for row, document in enumerate(members)}
    heads = np.full(int(buckets.max(initial=-1)) + 1, -1, dtype=np.int32)
    following = np.full(buckets.shape, -1, dtype=np.int32)
    error = _DEVIATIONS * (similarity * (1 - similarity) / signatures.shape[1]) ** 0.5
    for document in sorted(row_of, key=lambda number: (-lengths[number], number)):
        row = row_of[document]
        partners = _staying(buckets[row], heads, following)
        if partners and (best := _closest(document, members[partners], signatures, texts, similarity, error)):
            kept[document], found[document] = best
            continue
        bands = np.flatnonzero(buckets[row] >= 0)
        following[row, bands] = heads[buckets[row, bands]]
        heads[buckets[row, bands]] = row
    return NearDuplicates(kept, found)


class PairSamples:
    """Some pairs of near-duplicates with the beginning of both, spread over all similarities, for people to look at.

    Args:
        near: all pairs.
    """

    def __init__(self, near: NearDuplicates) -> None:
        ranked = sorted(near.similarity, key=lambda document: (near.similarity[document], document))
        step = max(len(ranked) / _PAIRS, 1)
        self._chosen = [ranked[int(place * step)] for place in range(min(_PAIRS, len(ranked)))]
        self._near = near
        self._seen = {n: ("", "") for document in self._chosen for n in (document, near.kept[document])}

    def see(self, number: int, document: Document) -> None:
        """Look at a document as it passes."""
        if number in self._seen:
            self._seen[number] = document.id, document.text.strip()[:_EXCERPT]

    def rows(self) -> list[dict[str, Any]]:
        """Return similarity, ids and texts of the pairs, the least similar first."""
        pairs = ((document, self._near.kept[document]) for document in self._chosen)
        return [
            {
                "similarity": round(self._near.similarity[document], 4),
                "dropped": dict(zip(("id", "text"), self._seen[document], strict=True)),
                "kept": dict(zip(("id", "text"), self._seen[kept], strict=True)),
            }
            for document, kept in pairs
        ]


def rows_per_band(similarity: float, permutations: int) -> int:
    """Return the most rows with which bands still propose a pair at the threshold with a probability of 0.98."""
    likely = [r for r in range(1, permutations) if 1 - (1 - similarity**r) ** (permutations // r) >= _RECALL]
    return max(likely, default=1)


def _closest(
    document: int,
    partners: NDArray[np.int64],
    signatures: Signatures,
    texts: ShingleFile,
    similarity: float,
    error: float,
) -> tuple[int, float] | None:
    """Return the partner of highest similarity, if it reaches the threshold, and the similarity."""
    estimated = (signatures[partners] == signatures[document]).mean(axis=1)
    own = texts[document]
    exact = [
        (jaccard(own, texts[int(partner)]), -int(partner)) for partner in partners[estimated >= similarity - error]
    ]
    best, partner = max(exact, default=(-1.0, 0))
    return (-partner, best) if best >= similarity else None


def _staying(buckets: NDArray[np.int32], heads: NDArray[np.int32], following: NDArray[np.int32]) -> list[int]:
    """Return the rows of the documents that stay and share a bucket, each once, the latest of each bucket first."""
    rows: set[int] = set()
    for band, bucket in enumerate(buckets.tolist()):
        if bucket < 0:
            continue
        row = int(heads[bucket])
        while row >= 0 and len(rows) < _COMPARED:
            rows.add(row)
            row = int(following[row, band])
    return sorted(rows)


def _buckets(signatures: Signatures, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return the documents that share a band with another one, ascending, and their buckets [documents, bands].

    A bucket is a number that the documents with equal rows in a band have in common; -1 where a document is alone.
    """
    bands = [slice(start, start + rows) for start in range(0, signatures.shape[1] - rows + 1, rows)]
    alone = np.ones(len(signatures), dtype=bool)
    for band in bands:
        _, inverse, sizes = _grouped(signatures[:, band])
        alone &= sizes[inverse] < 2
    members = np.flatnonzero(~alone)
    buckets = np.full((len(members), len(bands)), -1, dtype=np.int32)
    first = 0
    for column, band in enumerate(bands):
        _, inverse, sizes = _grouped(signatures[members, band])
        numbers = np.where(sizes > 1, first + np.cumsum(sizes > 1) - 1, -1)
        buckets[:, column] = numbers[inverse]
        first += int((sizes > 1).sum())
    return members, buckets


def _grouped(band: Signatures) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    mixed = np.zeros(len(band), dtype=np.uint64)
    for column in band.T:
        mixed = (mixed ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed, return_inverse=True, return_counts=True)


class Clusters:
    """Disjoint sets over the numbers 0..n-1; a set is named by its smallest member."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, member: int) -> int:
        """Return the smallest member of the set that `member` is in."""
        while self._parent[member] != member:
            self._parent[member] = self._parent[self._parent[member]]
            member = self._parent[member]
        return member

    def join(self, one: int, other: int) -> None:
        """Make the sets of two members one."""
        low, high = sorted((self.find(one), self.find(other)))
        self._parent[high] = low
