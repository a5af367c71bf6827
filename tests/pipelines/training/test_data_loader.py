"""Which rank sees which samples: together exactly the step's, each once, in chunks as long as the phase wants them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from models.architectures.config import IGNORED
from models.objectives import causal
from models.objectives.base import Ids, ObjectiveContext
from pipelines.core.errors import IntegrityError
from pipelines.training import phases
from pipelines.training.config import PretrainConfig
from pipelines.training.data_loader import Batch, DataLoader, Prefetcher
from pipelines.training.distributed import Ranks
from pipelines.training.rollbacks import Rollback

LENGTH, PAD = 12, 2


@dataclass(frozen=True)
class Numbered:
    """Sequences whose tokens say where they stand: sequence * 100 + position, + 10."""

    sequences: int
    sequence_length: int = LENGTH

    def __len__(self) -> int:
        return self.sequences

    def take(self, indices: Ids) -> Ids:
        return np.asarray(indices)[:, None] * 100 + np.arange(self.sequence_length) + 10


@pytest.fixture
def loader_of(tiny_settings: dict[str, Any]) -> Callable[..., DataLoader]:
    """Return the loader of one rank."""

    def make(rank: int = 0, world: int = 1, *, train: int = 40, validation: int = 7, **changes: Any) -> DataLoader:
        config = PretrainConfig.model_validate({**tiny_settings, "world_size": world, **changes})
        return DataLoader(
            train=Numbered(train),
            validation=Numbered(validation),
            objective=causal.Objective(ObjectiveContext(0, 5000, 0, 1, PAD, 3), causal.Objective.Config()),
            ranks=Ranks(rank, world, torch.device("cpu")),
            seed=config.seed,
            phases=phases.phases_of(config),
            micro_batch_size=config.micro_batch_size,
            validation_sequences=config.validation_sequences,
        )

    return make


def first_tokens(batches: list[Batch]) -> list[int]:
    return [int(token) for batch in batches for token in batch.inputs_BT[:, 0]]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_together_see_every_sample_of_a_step_once(world: int, loader_of: Callable[..., DataLoader]) -> None:
    for step in range(6):
        seen = [token for rank in range(world) for token in first_tokens(loader_of(rank, world).batches(step))]
        wanted = [int(sample) * 100 + 10 for sample in loader_of().ids(step)]
        assert sorted(seen) == sorted(wanted)
        assert len(set(wanted)) == 8


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks(loader_of: Callable[..., DataLoader]) -> None:
    for step in range(6):
        assert np.array_equal(loader_of(0, 1).ids(step), loader_of(1, 2).ids(step))


def test_an_epoch_shows_every_sequence_once_before_any_again(loader_of: Callable[..., DataLoader]) -> None:
    shown = np.concatenate([loader_of(train=24).ids(step) for step in range(6)])
    assert sorted(shown[:24]) == list(range(24))
    assert sorted(shown[24:]) == list(range(24))
    assert list(shown[:24]) != list(shown[24:])


def test_a_phase_of_short_sequences_gets_the_chunks_of_the_packed_ones(loader_of: Callable[..., DataLoader]) -> None:
    short = {"steps": 10, "sequence_length": LENGTH // 3, "batch_size": 12, "micro_batch_size": 2}
    loader = loader_of(
        phases=[short, {"steps": 2, "batch_size": 12, "schedule": {"warmup": 0}}], steps=12, batch_size=12
    )
    shown = []
    for step in range(10):
        for sample, batch in zip(loader.ids(step).reshape(-1, 2), loader.batches(step), strict=True):
            assert batch.inputs_BT.shape[1] == batch.targets_BT.shape[1] <= LENGTH // 3
            starts = [s // 3 * 100 + s % 3 * (LENGTH // 3) + 10 for s in sample.tolist()]
            assert batch.inputs_BT[:, 0].tolist() == starts
            shown += starts
    assert len(set(shown)) == 120
    assert all(batch.inputs_BT.shape[1] > LENGTH // 3 for batch in loader.batches(10))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_asks_for_each_sequence_once_and_gives_every_rank_as_many_batches(
    world: int, loader_of: Callable[..., DataLoader]
) -> None:
    """5 of 7 sequences in micro batches of 2: what is repeated to fill the last ones asks for nothing."""
    batch = {"batch_size": 2 * world}
    ranks = [list(loader_of(rank, world, **batch).validation_batches()) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    asked = [
        int(tokens[0])
        for batches in ranks
        for each in batches
        for tokens, targets in zip(each.inputs_BT, each.targets_BT, strict=True)
        if bool((targets != IGNORED).any())
    ]
    assert sorted(asked) == [n * 7 // 5 * 100 + 10 for n in range(5)]


@pytest.mark.parametrize(("train", "validation", "split"), [(0, 7, "train"), (40, 0, "validation")])
def test_an_empty_split_is_refused_by_name(
    train: int, validation: int, split: str, loader_of: Callable[..., DataLoader]
) -> None:
    with pytest.raises(IntegrityError, match=f"the {split} split of the prepare artifact holds no sequence"):
        loader_of(train=train, validation=validation)


# ---- made while a step runs -----------------------------------------------------------------------------------------


@pytest.fixture
def prefetcher(loader_of: Callable[..., DataLoader]) -> Iterator[Callable[..., Prefetcher]]:
    made = []

    def make(steps: int = 6) -> Prefetcher:
        made.append(Prefetcher(loader_of(), steps))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_what_is_made_ahead_is_what_would_be_made_at_the_step(
    prefetcher: Callable[..., Prefetcher], loader_of: Callable[..., DataLoader]
) -> None:
    ahead = prefetcher()
    for step in range(6):
        assert first_tokens(ahead.batches(step)) == first_tokens(loader_of().batches(step))


def test_a_rollback_and_a_resume_throw_away_what_was_made_ahead(
    prefetcher: Callable[..., Prefetcher], loader_of: Callable[..., DataLoader]
) -> None:
    ahead, undone = prefetcher(), [Rollback(1, 3, 16, "loss_spikes", "")]
    plain = [first_tokens(loader_of().batches(step)) for step in range(6)]
    assert first_tokens(ahead.batches(2)) == plain[2]
    assert first_tokens(ahead.batches(1, undone)) == first_tokens(loader_of().batches(1, undone)) == plain[3]
    assert first_tokens(ahead.batches(2, undone)) == plain[4]
    assert first_tokens(ahead.batches(0)) == plain[0]


def test_the_next_batch_is_made_before_anyone_asks_for_it(loader_of: Callable[..., DataLoader]) -> None:
    second = threading.Event()

    class Watched(Numbered):
        def take(self, indices: Ids) -> Ids:
            taken.append(len(indices))
            if sum(taken) == 16:
                second.set()
            return super().take(indices)

    taken: list[int] = []
    ahead = Prefetcher(dataclasses.replace(loader_of(), train=Watched(40)), 6)
    ahead.batches(0)
    assert second.wait(30)
    ahead.close()


def test_nothing_is_made_beyond_the_last_step(prefetcher: Callable[..., Prefetcher]) -> None:
    ahead = prefetcher(steps=2)
    ahead.batches(1)
    assert ahead._next is None


def test_a_fault_of_the_thread_comes_out_at_its_step(loader_of: Callable[..., DataLoader]) -> None:
    class Damaged(Numbered):
        def take(self, indices: Ids) -> Ids:
            if 1 in taken:
                raise IntegrityError("a shard is damaged")
            taken.append(1)
            return super().take(indices)

    taken: list[int] = []
    ahead = Prefetcher(dataclasses.replace(loader_of(micro_batch_size=8), train=Damaged(40)), 6)
    ahead.batches(0)
    with pytest.raises(IntegrityError, match="a shard is damaged"):
        ahead.batches(1)
    ahead.close()
