"""Duplicates: MinHash signatures, banding, and the clusters they form.

Two documents are near-duplicates when the Jaccard similarity of their word shingles, estimated from MinHash
signatures (Broder 1997), reaches a threshold. Candidates come from locality-sensitive banding by sorting: memory per
document is one signature, and the result does not depend on order of arrival beyond "the first of a cluster stays".
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray

from pipelines.data.shingles import hash_runs

BAND_ROWS = 4
"""Rows per band: with 128 permutations, two documents of similarity 0.6 meet in a band with probability 0.99."""

Signatures = NDArray[np.uint32]
"""[documents, permutations]."""


def signature(words: NDArray[np.uint64], *, shingle_words: int, permutations: int, seed: int) -> Signatures:
    """Return the MinHash signature of a document, uint32 [permutations].

    Args:
        words: what `shingles.hash_words` returned for the document.
        shingle_words: words per shingle.
        permutations: length of the signature.
        seed: seed of the permutations.
    """
    distinct = np.unique((hash_runs(words, shingle_words) >> np.uint64(32)).astype(np.uint32))
    sketch = _empty_sketch(permutations, seed).copy()
    sketch.update_batch(distinct.tolist())
    return sketch.hashvalues.astype(np.uint32)


@functools.cache
def _empty_sketch(permutations: int, seed: int) -> MinHash:
    # Drawing the permutations costs more than using them, so all sketches of a process share them.
    return MinHash(permutations, seed=seed, hashfunc=int, scheme="affine32")


def near_pairs(signatures: Signatures, similarity: float) -> Iterator[tuple[int, int]]:
    """Yield pairs (earlier, later) of documents whose estimated similarity reaches `similarity`.

    Within a bucket each document is compared with the leaders, those that resemble no earlier leader; the pairs
    yielded therefore connect every cluster without being all of its pairs.
    """
    for start in range(0, signatures.shape[1], BAND_ROWS):
        for bucket in _buckets(np.ascontiguousarray(signatures[:, start : start + BAND_ROWS])):
            leaders = [int(bucket[0])]
            for candidate in bucket[1:]:
                alike = (signatures[leaders] == signatures[candidate]).mean(axis=1) >= similarity
                yield from ((leaders[hit], int(candidate)) for hit in np.flatnonzero(alike))
                if not alike.any():
                    leaders.append(int(candidate))


def _buckets(band: Signatures) -> Iterator[NDArray[np.int64]]:
    """Yield the row numbers, ascending, of each set of two or more equal rows."""
    keys = band.view(f"V{band.shape[1] * band.itemsize}").ravel()
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    edges = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1], [True])))
    for first, last in itertools.pairwise(edges):
        if last - first > 1:
            yield order[first:last]


def clusters(signatures: Signatures, similarity: float) -> list[int]:
    """Return for every document the first document of its near-duplicate cluster (itself when it has none)."""
    found = Clusters(len(signatures))
    for one, other in near_pairs(signatures, similarity):
        found.join(one, other)
    return [found.find(document) for document in range(len(signatures))]


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
