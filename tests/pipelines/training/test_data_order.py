"""Data order: a pure function of seed and step, complete, and the same for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.training.data_order import EPOCHS_PER_PHASE, ids, permutation, philox, rank_share


def test_an_epoch_is_a_permutation_and_the_next_one_another() -> None:
    first, second = permutation(5, 0, 1000), permutation(5, 1, 1000)
    assert sorted(first.tolist()) == list(range(1000))
    assert sorted(second.tolist()) == list(range(1000))
    assert first.tolist() != second.tolist()
    assert permutation(6, 0, 1000).tolist() != first.tolist()


def test_the_order_is_pinned_so_that_no_library_can_change_it() -> None:
    assert permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert philox(1, 2, 2).tolist() == [5705853004827290377, 6584680345644299050]


def test_a_permutation_cannot_be_changed_by_its_users() -> None:
    with pytest.raises(ValueError, match="read-only"):
        permutation(0, 0, 10)[0] = 3


@given(size=st.integers(1, 40), batch=st.integers(1, 50), steps=st.integers(1, 12), seed=st.integers(0, 2**63 - 1))
def test_steps_walk_through_the_epochs_without_a_gap(size: int, batch: int, steps: int, seed: int) -> None:
    walked = np.concatenate([ids(seed, step * batch, batch, size)[0] for step in range(steps)]).tolist()
    epochs = -(-len(walked) // size)
    expected = [i for epoch in range(epochs) for i in permutation(seed, epoch, size).tolist()]
    assert walked == expected[: len(walked)]


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
