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


def philox(seed: int, stream: int, count: int, *, block: int = 0) -> NDArray[np.uint64]:
    """Return `count` random 64-bit words, a pure function of (seed, stream, block)."""
    return np.random.Philox(key=[seed, stream], counter=[0, 0, block, 0]).random_raw(count)


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> Ids:
    """Return the order of the samples 0..size-1 in one epoch."""
    order = np.argsort(philox(seed, epoch, size), kind="stable")
    order.setflags(write=False)
    return order


def step_ids(seed: int, step: int, batch_size: int, size: int) -> Ids:
    """Return the sample ids of one optimizer step, [batch_size]; steps count from 0.

    A batch that reaches the end of an epoch goes on in the next one, so no sample is dropped.

    Raises:
        ValueError: no samples at all.
    """
    if size < 1:
        raise ValueError("there are no samples to draw from")
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, size)
    parts = [permutation(seed, int(epoch), size)[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
    return np.concatenate(parts)


def epoch_of(step: int, batch_size: int, size: int) -> NDArray[np.int64]:
    """Return the epoch that each sample of a step belongs to, [batch_size]."""
    return np.arange(step * batch_size, (step + 1) * batch_size) // size


def rank_share(values: Ids, *, rank: int, world: int, micro_batch_size: int) -> Ids:
    """Return one rank's part of a step, [accumulation, micro_batch_size].

    Raises:
        ValueError: the batch does not split evenly.
    """
    if len(values) % (world * micro_batch_size):
        raise ValueError(f"a batch of {len(values)} does not split over {world} ranks x {micro_batch_size} sequences")
    return values.reshape(-1, world, micro_batch_size)[:, rank]
