"""Learning-rate schedules as pure functions: step -> multiplier of the peak rate.

Steps count from 0. A schedule of `total` steps warms up over the first `warmup` of them; its first step after that has
the peak rate, and a step after the last one would have `floor`. So every step trains: with a floor of 0 a decay that
reached it would waste the last step, and a schedule of one step would train nothing. Nothing is remembered between
calls, so resuming needs the step number only.
"""

from __future__ import annotations

import math
from typing import Literal

Warmup = Literal["linear", "sqrt"]
Decay = Literal["constant", "linear", "polynomial", "cosine", "wsd"]


def multiplier(
    step: int,
    *,
    total: int,
    warmup: int = 0,
    warmup_form: Warmup = "linear",
    decay: Decay = "cosine",
    floor: float = 0.0,
    power: float = 1.0,
    stable: float = 0.8,
) -> float:
    """Return the learning rate of a step as a share of its peak.

    Args:
        step: from 0; at or beyond `total` it stays at the value of the last step.
        total: steps of the schedule.
        warmup: steps of warm-up; the first step already moves (share 1 / warmup).
        warmup_form: "linear", or "sqrt", which rises faster at first.
        decay: what follows the warm-up; "wsd" (warm-up, stable, decay) stays at the peak and falls linearly at the end.
        floor: share of the peak that the decay heads for: the value of a step `total`.
        power: exponent of the "polynomial" decay.
        stable: share of the steps after the warm-up that "wsd" stays at the peak.

    Raises:
        ValueError: if a number is out of range.
    """
    check(total=total, warmup=warmup, floor=floor, power=power, stable=stable)
    if step < warmup:
        return warm_up((step + 1) / warmup, warmup_form)
    if total == warmup:
        return 1.0
    done = (min(step, total - 1) - warmup) / (total - warmup)
    return floor + (1 - floor) * remaining(done, decay, power=power, stable=stable)


def warm_up(done: float, form: Warmup = "linear") -> float:
    """Return the share of the peak when a share `done` of the warm-up is over."""
    return math.sqrt(done) if form == "sqrt" else done


def remaining(done: float, decay: Decay, *, power: float = 1.0, stable: float = 0.8) -> float:
    """Return what is left of the peak, from 1 to 0, when a share `done` of the decay is over.

    Raises:
        ValueError: if the decay is unknown.
    """
    if decay == "constant":
        return 1.0
    if decay == "linear":
        return 1 - done
    if decay == "polynomial":
        return float((1 - done) ** power)
    if decay == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if decay == "wsd":
        return 1.0 if done <= stable else (1 - done) / (1 - stable)
    raise ValueError(f"decay is {decay!r}: it must be constant, linear, polynomial, cosine or wsd")


def square_root_scaled(rate: float, batch: int, base_batch: int) -> float:
    """Return the rate for a batch, given the one for a base batch: it grows with the square root (LAMB's paper)."""
    return rate * math.sqrt(batch / base_batch)


def check(*, total: int, warmup: int, floor: float, power: float, stable: float) -> None:
    """Refuse a schedule that cannot be.

    Raises:
        ValueError: naming the value and its range.
    """
    if total < 1:
        raise ValueError(f"total is {total}: it must be at least 1 step")
    if not 0 <= warmup <= total:
        raise ValueError(f"warmup is {warmup}: it must be from 0 to the total of {total} steps")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor is {floor}: it must be from 0 to 1")
    if not power > 0:
        raise ValueError(f"power is {power}: it must be above 0")
    if not 0 <= stable < 1:
        raise ValueError(f"stable is {stable}: it must be at least 0 and below 1")
