"""Micro batches of one rank: which samples, from which shards, with which targets; the next step's are made meanwhile.

Legend: B sequences of a micro batch, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from models.architectures.config import IGNORED
from models.objectives.base import Ids, Objective
from pipelines.core.errors import IntegrityError
from pipelines.training import data_order, phases, step_data
from pipelines.training.distributed import Ranks
from pipelines.training.mixture import Mix
from pipelines.training.phases import Phase, Phases
from pipelines.training.rollbacks import Rollback

VALIDATION_EPOCH = 2**32 - 1
"""The epoch whose masks validation uses, every time the same."""


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
class Batch:
    """One micro batch."""

    inputs_BT: Tensor
    targets_BT: Tensor
    """`IGNORED` where nothing is asked."""
    targets: int
    """Number of targets, counted on the host before the batch went to a device."""
    tokens: int
    """Number of tokens without padding, counted there too."""

    @classmethod
    def of(cls, inputs_BT: Ids, targets_BT: Ids, pad_id: int) -> Batch:
        """Return the batch of arrays, on the CPU."""
        counts = (int(np.count_nonzero(targets_BT != IGNORED)), int(np.count_nonzero(inputs_BT != pad_id)))
        return cls(torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT), *counts)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; a GPU copies pinned memory while the host goes on."""
        inputs_BT, targets_BT = (part.to(device, non_blocking=True) for part in (self.inputs_BT, self.targets_BT))
        return Batch(inputs_BT, targets_BT, self.targets, self.tokens)

    def pinned(self) -> Batch:
        """Return the batch in memory that a GPU can copy from by itself."""
        return Batch(self.inputs_BT.pin_memory(), self.targets_BT.pin_memory(), self.targets, self.tokens)


@dataclass(frozen=True)
class DataLoader:
    """Cuts steps and validations into this rank's micro batches."""

    train: Reader
    validation: Reader
    objective: Objective
    ranks: Ranks
    seed: int
    phases: Phases
    micro_batch_size: int
    """Sequences of one forward pass of a validation."""
    validation_sequences: int
    mixes: Sequence[Mix] = ()
    """What each phase takes of each source; empty where sources are not mixed."""
    objectives: Sequence[Objective] = ()
    """Of each phase, where their settings differ; empty: `objective`, which is that of validation."""

    def __post_init__(self) -> None:
        for split, reader in (("train", self.train), ("validation", self.validation)):
            if len(reader) == 0:
                raise IntegrityError(
                    f"the {split} split of the prepare artifact holds no sequence",
                    hint="use more text, or a shorter prepare.sequence_length",
                )

    def ids(self, step: int, rollbacks: Sequence[Rollback] = ()) -> Ids:
        """Return the sample ids of a whole step, all ranks, [batch]; see `step_data.order`."""
        return self._order(phases.at(self.phases, step), step, rollbacks)[0]

    def digest(self, step: int, rollbacks: Sequence[Rollback] = ()) -> str:
        """Return a short hash of what a step trains on, over all ranks."""
        return step_data.digest(*self._order(phases.at(self.phases, step), step, rollbacks))

    def batches(self, step: int, rollbacks: Sequence[Rollback] = ()) -> list[Batch]:
        """Return this rank's micro batches of a step, on the CPU; a pure function, also of `rollbacks`."""
        phase = phases.at(self.phases, step)
        samples_B, epochs_B = self._order(phase, step, rollbacks)
        objective = self.objectives[phase.number] if self.objectives else self.objective
        return [
            self._batch(*objective.targets(self._tokens(phase, samples), samples, epochs))
            for samples, epochs in zip(
                self._share(samples_B, phase.micro_batch), self._share(epochs_B, phase.micro_batch), strict=True
            )
        ]

    def _order(self, phase: Phase, step: int, rollbacks: Sequence[Rollback]) -> tuple[Ids, Ids]:
        length = self.train.sequence_length
        return step_data.order(
            phase, step, rollbacks, seed=self.seed, sequences=len(self.train), length=length, mixes=self.mixes
        )

    def _tokens(self, phase: Phase, samples: Ids) -> Ids:
        """Return the tokens of samples, [len(samples), length of the phase]."""
        if (chunks := phases.chunks_a_sequence(phase, self.train.sequence_length)) == 1:
            return self.train.take(samples)
        length = self.train.sequence_length // chunks
        columns = (samples % chunks)[:, None] * length + np.arange(length)
        return np.take_along_axis(self.train.take(samples // chunks), columns, axis=1)

    def validation_batches(self) -> Iterator[Batch]:
        """Yield this rank's micro batches of the validation sample on its device, as many on every rank.

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
            inputs_BT, targets_BT = self.objective.targets(self.validation.take(used), used, epochs)
            yield self._batch(inputs_BT, np.where(real[:, None], targets_BT, IGNORED)).to(self.ranks.device)

    def _batch(self, inputs_BT: Ids, targets_BT: Ids) -> Batch:
        return Batch.of(inputs_BT, targets_BT, self.objective.context.pad_id)

    def _share(self, values: Ids, micro_batch: int) -> Ids:
        return data_order.rank_share(values, rank=self.ranks.rank, world=self.ranks.world, micro_batch_size=micro_batch)


class Prefetcher:
    """Makes the micro batches of the next step in a thread while a step runs.

    A batch is a pure function of (step, rollbacks), so what was made for another pair is simply thrown away: after a
    rollback nothing stale can be trained on, and a killed run loses nothing.

    Args:
        loader: makes them.
        steps: of the run; nothing is made beyond them.
    """

    def __init__(self, loader: DataLoader, steps: int) -> None:
        self._loader = loader
        self._steps = steps
        self._device = loader.ranks.device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-batch")
        self._wanted: tuple[int, tuple[Rollback, ...]] | None = None
        self._next: Future[list[Batch]] | None = None

    def batches(self, step: int, rollbacks: Sequence[Rollback] = ()) -> list[Batch]:
        """Return the micro batches of a step on this rank's device, and begin with those of the step after it."""
        if self._next is None or self._wanted != (step, tuple(rollbacks)):
            self._begin(step, rollbacks)
        assert self._next is not None
        made, self._next = self._next.result(), None
        if step + 1 < self._steps:
            self._begin(step + 1, rollbacks)
        return [batch.to(self._device) for batch in made]

    def close(self) -> None:
        """Wait for the thread and end it."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _begin(self, step: int, rollbacks: Sequence[Rollback]) -> None:
        self._wanted = (step, tuple(rollbacks))
        self._next = self._thread.submit(self._make, *self._wanted)

    def _make(self, step: int, rollbacks: Sequence[Rollback]) -> list[Batch]:
        made = self._loader.batches(step, rollbacks)
        return [batch.pinned() for batch in made] if self._device.type == "cuda" else made
