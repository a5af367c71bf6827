"""Data order: a pure function of seed and step, complete, and the same for any number of ranks."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.objectives.base import Ids
from pipelines.training.data_order import EPOCHS_PER_PHASE, ids, permuted, philox, rank_share


def permutation(seed: int, epoch: int, size: int) -> Ids:
    return permuted(seed, epoch, size, np.arange(size))


def test_an_epoch_is_a_permutation_and_the_next_one_another() -> None:
    first, second = permutation(5, 0, 1000), permutation(5, 1, 1000)
    assert sorted(first.tolist()) == list(range(1000))
    assert sorted(second.tolist()) == list(range(1000))
    assert first.tolist() != second.tolist()
    assert permutation(6, 0, 1000).tolist() != first.tolist()


def test_the_order_is_pinned_so_that_no_library_can_change_it() -> None:
    assert permutation(0, 0, 10).tolist() == [1, 4, 9, 5, 3, 0, 8, 6, 2, 7]
    assert philox(1, 2, 2).tolist() == [5705853004827290377, 6584680345644299050]


@settings(deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**32 - 1))
def test_every_size_is_permuted(size: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(seed, epoch, size).tolist()) == list(range(size))


def test_every_order_of_a_few_samples_is_about_as_likely() -> None:
    orders = Counter(tuple(permutation(seed, 0, 4).tolist()) for seed in range(2400))
    assert len(orders) == 24
    assert sum((count - 100) ** 2 / 100 for count in orders.values()) < 49.7  # chi-squared, 23 degrees, p = 0.001


def test_neighbours_do_not_stay_neighbours() -> None:
    order = permutation(1, 0, 10_000)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.04


def test_ten_billion_samples_need_no_more_than_those_that_are_asked_for() -> None:
    tracemalloc.start()
    samples, _ = ids(0, 9_999_999_990, 20, 10**10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(samples.tolist())) == 20
    assert 0 <= samples.min() <= samples.max() < 10**10
    assert peak < 100_000


@settings(deadline=None)
@given(size=st.integers(1, 40), batch=st.integers(1, 50), steps=st.integers(1, 12), seed=st.integers(0, 2**63 - 1))
def test_steps_walk_through_the_epochs_without_a_gap(size: int, batch: int, steps: int, seed: int) -> None:
    walked = np.concatenate([ids(seed, step * batch, batch, size)[0] for step in range(steps)]).tolist()
    epochs = -(-len(walked) // size)
    expected = [i for epoch in range(epochs) for i in permutation(seed, epoch, size).tolist()]
    assert walked == expected[: len(walked)]


@settings(deadline=None)
@given(size=st.integers(1, 40), batch=st.integers(1, 50), step=st.integers(0, 12))
def test_every_sample_knows_its_epoch(size: int, batch: int, step: int) -> None:
    epochs = ids(0, step * batch, batch, size)[1].tolist()
    assert epochs == [(step * batch + i) // size for i in range(batch)]


def test_a_phase_has_epochs_and_an_order_of_its_own() -> None:
    samples, epochs = ids(3, 0, 40, 40, phase=2)
    assert set(epochs.tolist()) == {2 * EPOCHS_PER_PHASE}
    assert sorted(samples.tolist()) == list(range(40))
    assert samples.tolist() != ids(3, 0, 40, 40)[0].tolist()


@given(world=st.integers(1, 6), micro=st.integers(1, 4), accumulation=st.integers(1, 4))
def test_the_ranks_share_a_batch_without_loss(world: int, micro: int, accumulation: int) -> None:
    batch = np.arange(world * micro * accumulation) * 7
    shares = [rank_share(batch, rank=rank, world=world, micro_batch_size=micro) for rank in range(world)]
    assert all(share.shape == (accumulation, micro) for share in shares)
    assert sorted(np.concatenate(shares).ravel().tolist()) == batch.tolist()


def test_the_samples_of_a_step_do_not_depend_on_the_world() -> None:
    batch = ids(3, 48, 12, 100)[0]
    worlds = {
        world: sorted(
            sample
            for rank in range(world)
            for sample in rank_share(batch, rank=rank, world=world, micro_batch_size=1).ravel().tolist()
        )
        for world in (1, 2, 3, 4)
    }
    assert all(samples == sorted(batch.tolist()) for samples in worlds.values())


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 10 does not split over 2 ranks x 3 sequences"):
        rank_share(np.arange(10), rank=0, world=2, micro_batch_size=3)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        ids(0, 0, 4, 0)


def test_streams_of_random_words_are_apart() -> None:
    words = [philox(seed, stream, 4, block=block).tolist() for seed in (0, 1) for stream in (0, 1) for block in (0, 1)]
    assert len({tuple(w) for w in words}) == 8
    assert philox(0, 0, 8).tolist()[:4] == philox(0, 0, 4).tolist()
