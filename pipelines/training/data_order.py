"""Data order as a pure function of (seed, step): the same samples per step at any world size; resuming needs no replay.

Samples are laid out epoch after epoch, each epoch a permutation keyed by (seed, epoch), and a step takes the next
`batch_size` of them. No permutation is ever stored: a Feistel network maps a place in the epoch to its sample, so a
rank needs as much memory and time for ten billion samples as for ten.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.objectives.base import Ids, philox
from pipelines.training.mixture import Mix

EPOCHS_PER_PHASE = 1 << 24
"""More than any phase has: the number of an epoch is below 2^32 for up to 255 phases."""
_BLOCKS = 1 << 62
"""Streams from here on order the blocks of mixtures, those below the sources, and those below 2^32 all samples."""
_ROUNDS = 8
"""Four make a Feistel network a pseudo-random permutation (Luby and Rackoff 1988); small domains want a few more."""


def permuted(seed: int, epoch: int, size: int, places: Ids) -> Ids:
    """Return the samples that stand at some places of an epoch's order of 0..size-1, of the shape of `places`.

    The network permutes 2^(2h) numbers, at most four times `size`; a result beyond `size` is put in again until it is
    one of ours ("cycle walking", Black and Rogaway 2002), which leaves a permutation of 0..size-1.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    keys = philox(seed, epoch, _ROUNDS)
    found = _network(places.astype(np.uint64), keys, half)
    while len(outside := np.flatnonzero(found >= size)):
        found[outside] = _network(found[outside], keys, half)
    return found.astype(np.int64)


def _network(values: NDArray[np.uint64], keys: NDArray[np.uint64], half: np.uint64) -> NDArray[np.uint64]:
    low = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & low
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & low)
    return (left << half) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 finalizer (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
    parts = [permuted(seed, int(epoch), size, offsets[epochs == epoch]) for epoch in np.unique(epochs)]
    return np.concatenate(parts), epochs


def mixed(seed: int, first: int, count: int, mix: Mix, *, phase: int) -> tuple[Ids, Ids]:
    """Return the `count` samples after the first `first` ones of a phase that mixes sources, and the epoch of each.

    See `pipelines.training.mixture`. A block's order, and each order of a source, are streams of their own.
    """
    blocks, offsets = np.divmod(np.arange(first, first + count), mix.block)
    slots = np.empty(count, dtype=np.int64)
    for block in np.unique(blocks):
        mine = blocks == block
        slots[mine] = permuted(seed, _BLOCKS + phase * EPOCHS_PER_PHASE + int(block), mix.block, offsets[mine])
    samples, epochs, low = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64), 0
    for portion in mix.portions:
        mine = np.flatnonzero((slots >= low) & (slots < low + portion.count))
        size = portion.source.sequences * mix.chunks
        passes, places = np.divmod(portion.drawn + blocks[mine] * portion.count + slots[mine] - low, size)
        epochs[mine] = passes + mix.order * EPOCHS_PER_PHASE
        for epoch in np.unique(epochs[mine]):
            now = epochs[mine] == epoch
            stream = ((portion.number + 1) << 32) + int(epoch)
            samples[mine[now]] = portion.source.first * mix.chunks + permuted(seed, stream, size, places[now])
        low += portion.count
    return samples, epochs


def rank_share(values: Ids, *, rank: int, world: int, micro_batch_size: int) -> Ids:
    """Return one rank's part of a step, [accumulation, micro_batch_size].

    Raises:
        ValueError: the batch does not split evenly.
    """
    if len(values) % (world * micro_batch_size):
        raise ValueError(f"a batch of {len(values)} does not split over {world} ranks x {micro_batch_size} sequences")
    return values.reshape(-1, world, micro_batch_size)[:, rank]
