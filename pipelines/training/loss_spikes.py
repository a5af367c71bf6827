"""Going back from a loss spike: the last good checkpoint, and other data than what led to the spike.

A spike at step t, with the newest good checkpoint at s, makes a *rollback* (s, t): weights, moments and schedule go on
from s, and from s on every batch comes from as many sequences later as the steps s to t took (of the same phase), so
those are never seen.
The data of a step is thereby a pure function of the step and of the list of rollbacks, and that list, on the disk
before training goes on, is all that a resumed run needs to end with the same bytes.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pipelines.core import artifact
from pipelines.training.phases import Phase


@dataclass(frozen=True)
class Rollback:
    """One return to a checkpoint."""

    step: int
    """Steps that the restored state has behind it."""
    spiked_at: int
    """The step whose loss was too high, counted from 1."""
    samples: int
    """Sequences that are left out."""
    loss: float
    """Of the spike, nats per target."""
    median: float
    """Of the window before it."""

    @classmethod
    def of(cls, found: Self | dict[str, Any]) -> Self:
        """Return the rollback, which may have come out of JSON."""
        return cls(**found) if isinstance(found, dict) else found


def is_spike(loss: float, recent: Sequence[float], *, factor: float, window: int) -> bool:
    """Tell whether a loss is more than `factor` times the median of the last `window` ones; never before there are."""
    return len(recent) >= window and loss > factor * statistics.median(recent[-window:])


def extended(recent: Sequence[float], loss: float, window: int) -> list[float]:
    """Return the last `window` finite losses."""
    return [*recent, loss][-window:] if math.isfinite(loss) else list(recent)


def shown(phase: Phase, first: int, end: int) -> int:
    """Return how many sequences a phase shows in the steps `first` to `end` of the run, the last one not included."""
    low, high = (min(max(step - phase.first, 0), phase.steps) for step in (first, end))
    return phase.samples_before(high) - phase.samples_before(low)


def left_out(phase: Phase, rollbacks: Sequence[Rollback], step: int) -> int:
    """Return how many sequences of its phase later than usual the batch of a step begins; steps count from 0."""
    return sum(shown(phase, each.step, each.spiked_at) for each in rollbacks if each.step <= step)


def read(path: Path) -> list[Rollback]:
    """Return the recorded rollbacks; none where the file is missing."""
    return [Rollback.of(found) for found in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def write(path: Path, rollbacks: Sequence[Rollback]) -> None:
    """Put all rollbacks on the disk."""
    artifact.write_text(path, json.dumps([asdict(rollback) for rollback in rollbacks], indent=1))
