"""The simulated training beside sums that can be done by hand, and what the page says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.bench import scale_model
from tests.bench.scale_model import TODAY, TREE, Training, analytic, ratio


def test_without_faults_only_saves_cost() -> None:
    never = replace(TREE, faults_per_rank_day=1e-9, agree=0.0, hop=0.0)
    work = never.interval(8)
    assert ratio(never, 8, days=work / 86400 * 50, seed=0) == pytest.approx(work / (work + never.save), rel=0.03)


@pytest.mark.parametrize("ranks", [1024, 4096])
def test_the_simulation_is_near_the_first_order_where_faults_are_rare(ranks: int) -> None:
    assert ratio(TODAY, ranks, days=120, seed=1) == pytest.approx(analytic(TODAY, ranks), abs=0.01)


def test_faults_come_at_the_published_rate() -> None:
    run = Training(TREE, 16384, seed=2)
    run.run(54 * 86400.0)
    assert run.faults == pytest.approx(419, rel=0.15)


def test_what_breaks_first() -> None:
    """Connections beyond Linux's default limit, then the meeting of all with all; a tree has neither."""
    assert [scale_model.DEFAULT_LIMIT.can_start(ranks) for ranks in (512, 1024)] == [True, False]
    assert TODAY.can_start(16384)
    assert ratio(TODAY, 16384, days=30, seed=0) < 0.5 < 0.9 < ratio(TODAY, 4096, days=30, seed=0)
    assert ratio(TREE, 16384, days=30, seed=0) > 0.97


def test_a_fault_costs_half_an_interval_and_a_restart() -> None:
    """Two ranks that die often, as in the soak; hangs aside."""
    soak = replace(TREE, faults_per_rank_day=720.0, hangs=0.0, save=0.05, step=0.1, start=8.0, read=0.1)
    assert soak.between_faults(2) == 60.0
    assert ratio(soak, 2, days=2, seed=3) == pytest.approx(analytic(soak, 2), rel=0.03)
