"""Which data a step trains on: a pure function of configuration, step and rollbacks. No torch: commands ask it too."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.objectives.base import Ids
from pipelines.core.errors import ConfigError
from pipelines.data import document_files
from pipelines.data.shards import ShardReader
from pipelines.training import data_order, phases
from pipelines.training.config import PretrainConfig
from pipelines.training.mixture import Mix
from pipelines.training.phases import Phase
from pipelines.training.rollbacks import Rollback, samples_left_out


def order(
    phase: Phase,
    step: int,
    rollbacks: Sequence[Rollback],
    *,
    seed: int,
    sequences: int,
    length: int,
    mixes: Sequence[Mix] = (),
) -> tuple[Ids, Ids]:
    """Return the sample ids of a whole step, all ranks, and the epoch of each, both [batch].

    A sample is a packed sequence, or, in a phase of shorter ones, a chunk of it: chunk c of sequence s is number
    s * chunks + c. What `rollbacks` went back from is left out.

    Args:
        phase: that the step is of.
        step: of the run, counted from 0.
        rollbacks: of the run until then.
        seed: of the run.
        sequences: packed sequences of the train split.
        length: tokens of one.
        mixes: of all phases; empty where sources are not mixed.
    """
    phase_step = step - phase.first
    first = phase.samples_before(phase_step) + samples_left_out(phase, rollbacks, step)
    if mixes:
        return data_order.mixed(seed, first, phase.batch(phase_step), mixes[phase.number], phase=phase.number)
    size = sequences * phases.chunks_a_sequence(phase, length)
    return data_order.ids(seed, first, phase.batch(phase_step), size, phase=phase.number)


def digest(samples_B: Ids, epochs_B: Ids) -> str:
    """Return a short hash of a step's samples in their order: the same at any world size."""
    return hashlib.blake2b(samples_B.tobytes() + epochs_B.tobytes(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Shown:
    """A part of a document that a step trained on."""

    rank: int
    micro_batch: int
    sequence: int
    """Number of the packed sequence in the train split."""
    first: int
    """Column that the part begins in."""
    end: int
    """Column behind its last token, or behind the padding after it."""
    id: str
    """Of the document."""
    source: str
    token: int
    """Token of the document that the part begins with, the start token is number 0."""


def documents_of(
    config: PretrainConfig, prepared: Path, step: int, rollbacks: Sequence[Rollback] = (), *, world: int | None = None
) -> tuple[str, list[Shown]]:
    """Return the digest of a step and what each rank sees in it, by rank, micro batch, sequence and column.

    Args:
        config: of the training.
        prepared: folder of the prepare artifact that it read.
        step: counted from 1, as in `metrics.jsonl`.
        rollbacks: of the run; `training.json` has them.
        world: number of ranks; None for the run's own.

    Raises:
        ConfigError: there is no such step, or its batch does not split over so many ranks.
    """
    if not 1 <= step <= config.steps:
        raise ConfigError(f"step {step} is none of this training", hint=f"valid: 1 to {config.steps}")
    reader = ShardReader(prepared, "train")
    phase, world = phases.at(phases.phases_of(config), step - 1), world or config.world_size
    samples_B, epochs_B = order(
        phase,
        step - 1,
        rollbacks,
        seed=config.seed,
        sequences=len(reader),
        length=reader.sequence_length,
        mixes=phases.mixes_of(config, reader.index),
    )
    if len(samples_B) % (world * phase.micro_batch):
        raise ConfigError(
            f"a batch of {len(samples_B)} sequences does not split over {world} ranks x {phase.micro_batch} sequences",
            hint="give another number of ranks",
        )
    chunks = phases.chunks_a_sequence(phase, reader.sequence_length)
    length = reader.sequence_length // chunks
    found: list[tuple[tuple[int, int, int], tuple[int, int, int, int]]] = []
    for rank in range(world):
        share = data_order.rank_share(samples_B, rank=rank, world=world, micro_batch_size=phase.micro_batch)
        for number, micro_batch in enumerate(share):
            for sample in micro_batch.tolist():
                row, low = sample // chunks, sample % chunks * length
                found += [((rank, number, row), part) for part in _within(reader, row, low, low + length)]
    names = _names(prepared, {document for _, (_, _, document, _) in found})
    shown = [Shown(*place, first, end, *names[document], token) for place, (first, end, document, token) in found]
    return digest(samples_B, epochs_B), shown


def _within(reader: ShardReader, row: int, low: int, high: int) -> list[tuple[int, int, int, int]]:
    """Return (first column, end, document, token) of the parts of a sequence in the columns `low` to `high`."""
    parts = reader.parts(row).tolist()
    ends = [part[0] for part in parts[1:]] + [reader.sequence_length]
    return [
        (max(column, low), min(end, high), document, token + max(low - column, 0))
        for (column, document, token), end in zip(parts, ends, strict=True)
        if column < high and end > low
    ]


def _names(prepared: Path, wanted: set[int]) -> dict[int, tuple[str, str]]:
    """Return number -> (id, source) of documents of the train split."""
    documents = document_files.documents(prepared / "documents" / "train.jsonl.zst")
    return {number: (each.id, each.source) for number, each in enumerate(documents) if number in wanted}
