"""Going back to the last good checkpoint, and on with other data than what led to the step that was undone.

A step t that a monitor refuses, with the newest good checkpoint at s, makes a *rollback* (s, t): weights, moments and
schedule go on from s, and from s on every batch comes from as many sequences later as the steps s to t took (of the
same phase), so those are never seen.
The data of a step is thereby a pure function of the step and of the list of rollbacks, and that list, on the disk
before training goes on, is all that a resumed run needs to end with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pipelines.core import artifact
from pipelines.core.artifact import read_json
from pipelines.training.phases import Phase


@dataclass(frozen=True)
class Rollback:
    """One return to a checkpoint."""

    step: int
    """Steps that the restored state has behind it."""
    spiked_at: int
    """The step that was refused, counted from 1."""
    samples: int
    """Sequences that are left out."""
    monitor: str
    """Name of the monitor that asked for it."""
    reason: str
    """Why, in the monitor's words."""

    @classmethod
    def of(cls, value: Self | dict[str, Any]) -> Self:
        """Return the rollback, which may have come out of JSON."""
        return cls(**value) if isinstance(value, dict) else value


def samples_between(phase: Phase, first: int, end: int) -> int:
    """Return how many sequences a phase shows in the steps `first` to `end` of the run, the last one not included."""
    low, high = (min(max(step - phase.first, 0), phase.steps) for step in (first, end))
    return phase.samples_before(high) - phase.samples_before(low)


def samples_left_out(phase: Phase, rollbacks: Sequence[Rollback], step: int) -> int:
    """Return how many sequences of its phase later than usual the batch of a step begins; steps count from 0."""
    return sum(samples_between(phase, each.step, each.spiked_at) for each in rollbacks if each.step <= step)


def read(path: Path) -> list[Rollback]:
    """Return the recorded rollbacks; none where the file is missing."""
    return [Rollback.of(value) for value in read_json(path)] if path.exists() else []


def write(path: Path, rollbacks: Sequence[Rollback]) -> None:
    """Put all rollbacks on the disk."""
    artifact.write_text(path, json.dumps([asdict(rollback) for rollback in rollbacks], indent=1))
