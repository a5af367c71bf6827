"""Adam's bias corrections, against the averages that they correct."""

from __future__ import annotations

import math

import pytest

from models.optim.kernels import check_adam, corrections


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.95, 0.0)])
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_a_corrected_average_of_equal_gradients_is_that_gradient(betas: tuple[float, float], steps: int) -> None:
    first = second = 0.0
    for _ in range(steps):
        first = betas[0] * first + (1 - betas[0]) * 3.0
        second = betas[1] * second + (1 - betas[1]) * 9.0
    one, two = corrections(betas, steps)
    assert first / one == pytest.approx(3.0, rel=1e-12)
    assert math.sqrt(second / two) == pytest.approx(3.0, rel=1e-12)


def test_without_end_nothing_is_left_to_correct() -> None:
    assert corrections((0.9, 0.999), math.inf) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("lr", "betas", "eps", "said"),
    [
        (-0.1, (0.9, 0.99), 1e-6, r"lr is -0\.1: it must not be negative"),
        (math.nan, (0.9, 0.99), 1e-6, "lr is nan"),
        (0.1, (1.0, 0.99), 1e-6, "each must be at least 0 and below 1"),
        (0.1, (0.9, -0.1), 1e-6, "each must be at least 0 and below 1"),
        (0.1, (0.9, math.nan), 1e-6, "betas are"),
        (0.1, (0.9, 0.99), -1e-9, "eps is -1e-09"),
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(
    lr: float, betas: tuple[float, float], eps: float, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check_adam(lr, betas, eps)


def test_the_edges_of_what_is_possible_are_taken() -> None:
    check_adam(0.0, (0.0, 0.0), 0.0)
