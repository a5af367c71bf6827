"""Which rank sees which samples: together exactly the step's, each once, in pieces as long as the phase wants them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from models.architectures.predict import IGNORED
from pipelines.core.errors import IntegrityError
from pipelines.training import phases
from pipelines.training.config import PretrainConfig
from pipelines.training.data_loader import Feed
from pipelines.training.data_order import Ids
from pipelines.training.distributed import Ranks
from pipelines.training.objectives import Batch, CausalTask

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
def feed_of(tiny_settings: dict[str, Any]) -> Callable[..., Feed]:
    """Return the feed of one rank."""

    def make(rank: int = 0, world: int = 1, *, train: int = 40, validation: int = 7, **changes: Any) -> Feed:
        config = PretrainConfig.model_validate({**tiny_settings, "world_size": world, **changes})
        return Feed(
            train=Numbered(train),
            validation=Numbered(validation),
            task=CausalTask(PAD),
            ranks=Ranks(rank, world, torch.device("cpu")),
            seed=config.seed,
            plan=phases.plan(config),
            micro_batch_size=config.micro_batch_size,
            validation_sequences=config.validation_sequences,
        )

    return make


def first_tokens(batches: list[Batch]) -> list[int]:
    return [int(token) for batch in batches for token in batch.inputs_BT[:, 0]]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_together_see_every_sample_of_a_step_once(world: int, feed_of: Callable[..., Feed]) -> None:
    for step in range(6):
        seen = [token for rank in range(world) for token in first_tokens(feed_of(rank, world).batches(step))]
        wanted = [int(sample) * 100 + 10 for sample in feed_of().ids(step)]
        assert sorted(seen) == sorted(wanted)
        assert len(set(wanted)) == 8


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks(feed_of: Callable[..., Feed]) -> None:
    for step in range(6):
        assert np.array_equal(feed_of(0, 1).ids(step), feed_of(1, 2).ids(step))


def test_an_epoch_shows_every_sequence_once_before_any_again(feed_of: Callable[..., Feed]) -> None:
    shown = np.concatenate([feed_of(train=24).ids(step) for step in range(6)])
    assert sorted(shown[:24]) == list(range(24))
    assert sorted(shown[24:]) == list(range(24))
    assert list(shown[:24]) != list(shown[24:])


def test_a_phase_of_short_sequences_gets_the_pieces_of_the_packed_ones(feed_of: Callable[..., Feed]) -> None:
    short = {"steps": 10, "sequence_length": LENGTH // 3, "batch_size": 12, "micro_batch_size": 2}
    feed = feed_of(phases=[short, {"steps": 2, "batch_size": 12, "schedule": {"warmup": 0}}], steps=12, batch_size=12)
    shown = []
    for step in range(10):
        for sample, batch in zip(feed.ids(step).reshape(-1, 2), feed.batches(step), strict=True):
            assert batch.inputs_BT.shape[1] == batch.targets_BT.shape[1] <= LENGTH // 3
            starts = [s // 3 * 100 + s % 3 * (LENGTH // 3) + 10 for s in sample.tolist()]
            assert batch.inputs_BT[:, 0].tolist() == starts
            shown += starts
    assert len(set(shown)) == 120
    assert all(batch.inputs_BT.shape[1] > LENGTH // 3 for batch in feed.batches(10))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_asks_for_each_sequence_once_and_gives_every_rank_as_many_batches(
    world: int, feed_of: Callable[..., Feed]
) -> None:
    """5 of 7 sequences in micro batches of 2: what is repeated to fill the last ones asks for nothing."""
    batch = {"batch_size": 2 * world}
    ranks = [list(feed_of(rank, world, **batch).validation_batches()) for rank in range(world)]
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
    train: int, validation: int, split: str, feed_of: Callable[..., Feed]
) -> None:
    with pytest.raises(IntegrityError, match=f"the {split} split of the prepare artifact holds no sequence"):
        feed_of(train=train, validation=validation)
