"""Micro batches of one rank: which samples, from which shards, with which targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipelines.errors import IntegrityError
from pipelines.training import sampler
from pipelines.training.objectives import IGNORED, VALIDATION_EPOCH, Batch, Task
from pipelines.training.ranks import Ranks
from pipelines.training.sampler import Ids


class Reader(Protocol):
    """Packed sequences by number."""

    def __len__(self) -> int: ...

    def take(self, indices: Ids) -> Ids:
        """Return the sequences, [len(indices), sequence length]."""
        ...


@dataclass(frozen=True)
class Feed:
    """Cuts steps and validations into this rank's micro batches."""

    train: Reader
    validation: Reader
    task: Task
    ranks: Ranks
    seed: int
    batch_size: int
    micro_batch_size: int
    validation_sequences: int

    def __post_init__(self) -> None:
        for split, reader in (("train", self.train), ("validation", self.validation)):
            if len(reader) == 0:
                raise IntegrityError(
                    f"the {split} split of the prepare artifact holds no sequence",
                    hint="use more text, or a shorter prepare.sequence_length",
                )

    def ids(self, step: int) -> Ids:
        """Return the sample ids of a whole step, all ranks, [batch_size]."""
        return sampler.step_ids(self.seed, step, self.batch_size, len(self.train))

    def batches(self, step: int) -> list[Batch]:
        """Return this rank's micro batches of a step."""
        epochs = sampler.epoch_of(step, self.batch_size, len(self.train))
        return [
            self.task.batch(self.train.take(samples), samples, of_epochs).to(self.ranks.device)
            for samples, of_epochs in zip(self._share(self.ids(step)), self._share(epochs), strict=True)
        ]

    def validation_batches(self) -> Iterator[Batch]:
        """Yield this rank's micro batches of the validation sample, as many on every rank.

        The sample is spread evenly over the split, the same each time. Where it does not fill the last micro batches,
        sequences are repeated without targets: under ZeRO-3 every rank must run as many forward passes as the others.
        """
        wanted = min(self.validation_sequences, len(self.validation))
        ids = np.arange(wanted) * len(self.validation) // wanted
        unit = self.ranks.world * self.micro_batch_size
        padded = np.concatenate([ids, np.full(-wanted % unit, -1)])
        for samples in self._share(padded):
            real = samples >= 0
            used = np.where(real, samples, 0)
            epochs = np.full(len(used), VALIDATION_EPOCH)
            batch = self.task.batch(self.validation.take(used), used, epochs)
            batch.targets_BT[~real] = IGNORED
            yield batch.to(self.ranks.device)

    def _share(self, values: Ids) -> Ids:
        return sampler.rank_share(
            values, rank=self.ranks.rank, world=self.ranks.world, micro_batch_size=self.micro_batch_size
        )
