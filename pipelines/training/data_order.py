"""Data order as a pure function of (seed, step): the same samples per step at any world size; resuming needs no replay.

Samples are laid out epoch after epoch, each epoch a permutation keyed by (seed, epoch), and a step takes the next
`batch_size` of them.
"""

from __future__ import annotations

import functools

import numpy as np

from models.objectives.base import Ids, philox

EPOCHS_PER_PHASE = 1 << 24
"""More than any phase has: the number of an epoch is below 2^32 for up to 255 phases."""


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
