"""How many steps to leave between checkpoints: Young's first-order optimum, by what saves and steps take.

A save costs `save_s` once an interval, a fault half an interval; their sum is least at sqrt(2 x save_s x seconds
between faults) (Young 1974, doi 10.1145/361147.361115; Daly 2006, doi 10.1016/j.future.2004.11.016). What a restart
takes is paid however often is saved, and is not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_DAY_S = 86400.0


def seconds(save_s: float, between_faults_s: float) -> float:
    """Return the interval with the least waste, in seconds of work.

    Args:
        save_s: for how long a save keeps the training waiting.
        between_faults_s: mean time between faults of all ranks together.
    """
    return math.sqrt(2.0 * save_s * between_faults_s)


@dataclass(frozen=True)
class Interval:
    """The interval of one training, for a stated rate of faults."""

    faults_per_day: float

    def steps(self, *, save_s: float, step_s: float) -> int:
        """Return the steps until the next save, at least 1.

        Args:
            save_s: measured seconds for which the last save kept the training waiting; one in the background that is
                not over when the next is due makes that one wait, and so becomes rarer by itself.
            step_s: measured seconds of a step.
        """
        return max(1, round(seconds(save_s, _DAY_S / self.faults_per_day) / max(step_s, 1e-9)))
