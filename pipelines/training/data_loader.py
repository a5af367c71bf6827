"""Micro batches of one rank: which samples, from which shards, with which targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from models.architectures.predict import IGNORED
from pipelines.core.errors import IntegrityError
from pipelines.training import data_order, phases
from pipelines.training.data_order import Ids
from pipelines.training.distributed import Ranks
from pipelines.training.loss_spikes import Rollback, left_out
from pipelines.training.objectives import VALIDATION_EPOCH, Batch, Task
from pipelines.training.phases import Phase, Plan


class Reader(Protocol):
    """Packed sequences by number."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        ...

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
    plan: Plan
    micro_batch_size: int
    """Sequences of one forward pass of a validation."""
    validation_sequences: int

    def __post_init__(self) -> None:
        for split, reader in (("train", self.train), ("validation", self.validation)):
            if len(reader) == 0:
                raise IntegrityError(
                    f"the {split} split of the prepare artifact holds no sequence",
                    hint="use more text, or a shorter prepare.sequence_length",
                )

    def ids(self, step: int, rollbacks: Sequence[Rollback] = ()) -> Ids:
        """Return the sample ids of a whole step, all ranks, [batch].

        A sample is a packed sequence, or, in a phase of shorter ones, a piece of it: piece p of sequence s is number
        s * pieces + p. What `rollbacks` went back from is left out.
        """
        return self._order(phases.at(self.plan, step), step, rollbacks)[0]

    def batches(self, step: int, rollbacks: Sequence[Rollback] = ()) -> list[Batch]:
        """Return this rank's micro batches of a step."""
        phase = phases.at(self.plan, step)
        samples_B, epochs_B = self._order(phase, step, rollbacks)
        return [
            self.task.batch(self._tokens(phase, samples), samples, epochs).to(self.ranks.device)
            for samples, epochs in zip(
                self._share(samples_B, phase.micro_batch), self._share(epochs_B, phase.micro_batch), strict=True
            )
        ]

    def _order(self, phase: Phase, step: int, rollbacks: Sequence[Rollback]) -> tuple[Ids, Ids]:
        local = step - phase.first
        first = phase.samples_before(local) + left_out(phase, rollbacks, step)
        size = len(self.train) * phases.pieces(phase, self.train.sequence_length)
        return data_order.ids(self.seed, first, phase.batch(local), size, phase=phase.number)

    def _tokens(self, phase: Phase, samples: Ids) -> Ids:
        """Return the tokens of samples, [len(samples), length of the phase]."""
        if (cuts := phases.pieces(phase, self.train.sequence_length)) == 1:
            return self.train.take(samples)
        length = self.train.sequence_length // cuts
        columns = (samples % cuts)[:, None] * length + np.arange(length)
        return np.take_along_axis(self.train.take(samples // cuts), columns, axis=1)

    def validation_batches(self) -> Iterator[Batch]:
        """Yield this rank's micro batches of the validation sample, as many on every rank.

        The sample is spread evenly over the split, the same each time. Where it does not fill the last micro batches,
        sequences are repeated without targets: under ZeRO-3 every rank must run as many forward passes as the others.
        """
        wanted = min(self.validation_sequences, len(self.validation))
        ids = np.arange(wanted) * len(self.validation) // wanted
        unit = self.ranks.world * self.micro_batch_size
        padded = np.concatenate([ids, np.full(-wanted % unit, -1)])
        for samples in self._share(padded, self.micro_batch_size):
            real = samples >= 0
            used = np.where(real, samples, 0)
            epochs = np.full(len(used), VALIDATION_EPOCH)
            batch = self.task.batch(self.validation.take(used), used, epochs)
            batch.targets_BT[~real] = IGNORED
            yield batch.to(self.ranks.device)

    def _share(self, values: Ids, micro_batch: int) -> Ids:
        return data_order.rank_share(values, rank=self.ranks.rank, world=self.ranks.world, micro_batch_size=micro_batch)
