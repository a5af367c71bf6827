"""Data order as a pure function of (seed, step): the same samples per step at any world size; resuming needs no replay.

Samples are laid out epoch after epoch, each epoch a permutation keyed by (seed, epoch), and a step takes the next
`batch_size` of them. Only the raw 64-bit stream of the Philox generator is used, which numpy guarantees to be stable
over versions, unlike the methods of `numpy.random.Generator`.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

EPOCHS_PER_PHASE = 1 << 24
"""More than any phase has: the number of an epoch is below 2^32 for up to 255 phases."""


def philox(seed: int, stream: int, count: int, *, block: int = 0) -> NDArray[np.uint64]:
    """Return `count` random 64-bit words, a pure function of (seed, stream, block)."""
    return np.random.Philox(key=[seed, stream], counter=[0, 0, block, 0]).random_raw(count)


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> Ids:
    """Return the order of the samples 0..size-1 in one epoch."""
    order = np.argsort(philox(seed, epoch, size), kind="stable")
    order.setflags(write=False)
    return order


def ids(seed: int, first: int, count: int, size: int, *, phase: int = 0) -> tuple[Ids, Ids]:
    """Return the `count` samples after the first `first` ones of a phase, and the epoch of each, both [count].

    A batch that reaches the end of an epoch goes on in the next one, so no sample is dropped. Epochs are numbered over
    all phases, so that no phase repeats the order, or the masks, of another.

    Raises:
        ValueError: no samples at all.
    """
    if size < 1:
        raise ValueError("there are no samples to draw from")
    epochs, offsets = np.divmod(np.arange(first, first + count), size)
    epochs += phase * EPOCHS_PER_PHASE
    parts = [permutation(seed, int(epoch), size)[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
    return np.concatenate(parts), epochs


def rank_share(values: Ids, *, rank: int, world: int, micro_batch_size: int) -> Ids:
    """Return one rank's part of a step, [accumulation, micro_batch_size].

    Raises:
        ValueError: the batch does not split evenly.
    """
    if len(values) % (world * micro_batch_size):
        raise ValueError(f"a batch of {len(values)} does not split over {world} ranks x {micro_batch_size} sequences")
    return values.reshape(-1, world, micro_batch_size)[:, rank]
