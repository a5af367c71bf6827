"""The interval between checkpoints: least waste, and a training that follows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.training.checkpoint import Checkpoints
from pipelines.training.checkpoint_interval import Interval, seconds
from pipelines.training.config import PretrainConfig


def test_no_other_interval_wastes_less() -> None:
    """Waste by the definition: a save an interval, and half an interval a fault."""
    save_s, between_s = 2.0, 3600.0

    def waste(interval_s: float) -> float:
        return save_s / interval_s + interval_s / 2 / between_s

    best = seconds(save_s, between_s)
    assert best == pytest.approx(120.0)
    assert all(waste(best) < waste(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_it_is_counted_in_steps_and_is_never_none() -> None:
    assert Interval(24.0).steps(save_s=2.0, step_s=10.0) == 12
    assert Interval(1e9).steps(save_s=1e-6, step_s=10.0) == 1


def test_a_rate_that_would_change_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"faults_per_day does nothing here.* = 50, .* there are 50 steps"):
        PretrainConfig(steps=50, checkpoint={"every": 50, "faults_per_day": 24})
    PretrainConfig(steps=51, checkpoint={"every": 50, "faults_per_day": 24})


@pytest.mark.slow
def test_a_training_saves_at_the_interval_that_follows_from_its_own_times(
    run_plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    asked: list[tuple[float, float]] = []
    save = Checkpoints.save

    def noted(self: Checkpoints, step: int, *arguments: Any, **options: Any) -> None:
        saved.append(step)
        save(self, step, *arguments, **options)

    def three(self: Interval, *, save_s: float, step_s: float) -> int:
        asked.append((save_s, step_s))
        return 3

    monkeypatch.setattr(Checkpoints, "save", noted)
    monkeypatch.setattr(Interval, "steps", three)
    assert run_plain(tmp_path, steps=10, checkpoint={"every": 2, "faults_per_day": 5.0}) == 0
    assert saved == [2, 5, 8, 10]
    assert all(save_s > 0 and step_s > 0 for save_s, step_s in asked)
