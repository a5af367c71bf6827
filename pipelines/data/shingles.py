"""Runs of words as numbers: what repetition and similarity are measured on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)


def hash_words(words: Sequence[str]) -> NDArray[np.uint64]:
    """Return one stable number per word (CRC-32), [words]."""
    return np.fromiter((zlib.crc32(word.encode()) for word in words), dtype=np.uint64, count=len(words))


def hash_runs(hashes: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """Return one number per run of `size` consecutive words, [words - size + 1]; a shorter text is one run.

    Args:
        hashes: what `hash_words` returned.
        size: words per run.
    """
    runs = max(len(hashes) - size + 1, 1)
    mixed = np.zeros(runs, dtype=np.uint64)
    for offset in range(min(size, len(hashes))):
        mixed = (mixed ^ hashes[offset : offset + runs]) * _MULTIPLIER
        mixed ^= mixed >> _SHIFT
    return mixed
