"""Schedules as functions of the step: ends, shapes, and refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.optim.schedule import multiplier, square_root_scaled

DECAYS: list[Any] = ["constant", "linear", "polynomial", "cosine", "wsd"]


@pytest.mark.parametrize("decay", DECAYS)
def test_warm_up_is_linear_and_ends_at_the_peak(decay: Any) -> None:
    shares = [multiplier(step, total=100, warmup=10, decay=decay) for step in range(10)]
    assert shares == pytest.approx([(step + 1) / 10 for step in range(10)])


def test_square_root_warm_up_rises_faster_at_first() -> None:
    assert multiplier(24, total=200, warmup=100, warmup_form="sqrt") == pytest.approx(0.5)


@pytest.mark.parametrize("decay", [decay for decay in DECAYS if decay != "constant"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_a_decay_reaches_its_floor_after_the_last_step(decay: Any, floor: float) -> None:
    """As the same decay over more steps shows, cut off at the same distance from its end."""
    last = multiplier(99_999, total=100_000, warmup=10, decay=decay, floor=floor)
    assert floor < last == pytest.approx(floor, abs=1e-4)
    assert multiplier(500, total=100, decay=decay, floor=floor) == multiplier(99, total=100, decay=decay, floor=floor)


@given(st.integers(1, 60), st.floats(0, 1), st.sampled_from(DECAYS), st.sampled_from(["linear", "sqrt"]))
def test_no_step_has_a_rate_of_zero(total: int, share: float, decay: Any, form: Any) -> None:
    """A step at rate 0 trains nothing: not the last one of a decay to 0, not the only one of a schedule of one."""
    warmup = int(share * total)
    rates = [multiplier(n, total=total, warmup=warmup, warmup_form=form, decay=decay) for n in range(total)]
    assert min(rates) > 0
    if warmup < total:
        assert rates[warmup] == 1.0


@given(
    st.integers(1, 300), st.floats(0, 1), st.sampled_from(DECAYS), st.floats(0, 1), st.floats(0.2, 4), st.floats(0, 0.9)
)
def test_after_the_warm_up_the_rate_never_rises(
    total: int, share: float, decay: Any, floor: float, power: float, stable: float
) -> None:
    warmup = int(share * total)
    options = {"total": total, "warmup": warmup, "decay": decay, "floor": floor, "power": power, "stable": stable}
    values = [multiplier(step, **options) for step in range(max(0, warmup - 1), total)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(values))
    assert all(0 <= value <= 1 + 1e-12 for value in values)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert multiplier(50, total=100, decay="cosine") == pytest.approx(0.5)


def test_polynomial_of_power_two_is_a_parabola() -> None:
    assert multiplier(50, total=100, decay="polynomial", power=2) == pytest.approx(0.25)


def test_wsd_stays_at_the_peak_and_then_falls_linearly() -> None:
    values = [multiplier(step, total=100, decay="wsd", stable=0.8) for step in range(100)]
    assert values[:81] == [1.0] * 81
    assert values[90] == pytest.approx(0.5)


def test_constant_stays_at_the_peak() -> None:
    assert multiplier(99, total=100, warmup=10, decay="constant") == 1.0


def test_a_schedule_of_warm_up_only_ends_at_the_peak() -> None:
    assert multiplier(9, total=10, warmup=10) == 1.0


def test_rates_scale_with_the_square_root_of_the_batch() -> None:
    # The paper's pairs: 5e-3 at batch 32 K, 5e-3 / sqrt(64) at 512.
    assert square_root_scaled(5e-3 / math.sqrt(64), 32768, 512) == pytest.approx(5e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total": 0}, "total is 0"),
        ({"total": 10, "warmup": 11}, "warmup is 11: it must be from 0 to the total of 10"),
        ({"total": 10, "floor": 1.5}, "floor is 1.5"),
        ({"total": 10, "power": 0}, "power is 0"),
        ({"total": 10, "stable": 1.0}, "stable is 1"),
        ({"total": 10, "decay": "steps"}, "decay is 'steps'"),
    ],
)
def test_impossible_schedules_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multiplier(1, **options)
