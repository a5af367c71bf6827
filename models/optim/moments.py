"""Adam's exponential averages and the direction they give.

m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
direction = (m / c1) / (sqrt(v / c2) + eps)    with c1 = 1 - b1^t, c2 = 1 - b2^t, or 1 without bias correction
"""

from __future__ import annotations


def corrections(betas: tuple[float, float], step: float) -> tuple[float, float]:
    """Return the two bias corrections (c1, c2) of a tensor's `step`-th update, counted from 1; (1, 1) at infinity."""
    return 1 - betas[0] ** step, 1 - betas[1] ** step


def check_adam(lr: float, betas: tuple[float, float], eps: float) -> None:
    """Refuse impossible hyperparameters.

    Raises:
        ValueError: naming the value and its range.
    """
    if not lr >= 0:
        raise ValueError(f"lr is {lr}: it must not be negative")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}: it must not be negative")
    for beta in betas:
        if not 0 <= beta < 1:
            raise ValueError(f"betas are {betas}: each must be at least 0 and below 1")
