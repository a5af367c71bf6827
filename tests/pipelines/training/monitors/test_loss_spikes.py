"""What counts as a loss spike; runs that go back from one are in test_rollbacks.py."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.training.config import PretrainConfig
from pipelines.training.monitors.loss_spikes import LossSpikesConfig, Monitor, extended, is_spike

losses = st.lists(st.floats(0.1, 20.0), max_size=12)


@given(losses, st.floats(0.1, 100.0), st.floats(1.1, 5.0), st.integers(2, 6))
def test_a_spike_is_a_loss_that_many_times_above_the_median_of_a_full_window(
    recent: list[float], loss: float, factor: float, window: int
) -> None:
    ordered = sorted(recent[len(recent) - window :]) if len(recent) >= window else []
    middle = (ordered[(window - 1) // 2] + ordered[window // 2]) / 2 if ordered else math.inf
    assert is_spike(loss, recent, factor=factor, window=window) == (loss > factor * middle)


@given(losses, st.integers(2, 6))
def test_the_window_holds_the_last_finite_losses(values: list[float], window: int) -> None:
    recent: list[float] = []
    for value in values:
        recent = extended(extended(recent, value, window), math.nan, window)
    assert recent == values[-window:]


def test_a_spike_is_refused_with_the_numbers_and_not_remembered() -> None:
    monitor = Monitor(LossSpikesConfig(factor=2.0, window=2))
    assert [monitor.refuses(loss) for loss in (1.0, 1.0, 1.5)] == [None] * 3
    assert monitor.refuses(9.0) == "the loss is 9, more than 2 times the median before it, 1.25"
    assert monitor.state() == {"recent": [1.0, 1.5]}


def test_a_table_without_a_factor_is_refused() -> None:
    with pytest.raises(ValidationError, match="factor"):
        PretrainConfig.model_validate({"monitors": {"loss_spikes": {"window": 5}}})
