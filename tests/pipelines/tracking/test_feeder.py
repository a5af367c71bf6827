"""The feeder: jobs in order on its own thread, callers never wait, faults close the door for a while."""

from __future__ import annotations

import logging
import threading
import time
from itertools import pairwise

import pytest

from pipelines.tracking.feeder import Feeder

LIMIT_S = 10.0


def nothing() -> None:
    """An idle job."""


def fail() -> None:
    """A job that MLflow would not do."""
    raise ConnectionError("refused")


def test_jobs_run_in_order_on_another_thread() -> None:
    feeder, seen = Feeder(nothing), []
    for number in range(100):
        last = feeder.put(lambda n=number: seen.append((n, threading.current_thread().name)))
    assert last.wait(LIMIT_S)
    assert [n for n, _ in seen] == list(range(100))
    assert {name for _, name in seen} == {"mlflow-feeder"}
    feeder.stop(LIMIT_S)


def test_what_somebody_waits_for_overtakes_what_waits() -> None:
    feeder, gate, done = Feeder(nothing), threading.Event(), []
    feeder.put(lambda: gate.wait(LIMIT_S))
    for number in range(3):
        last = feeder.put(lambda n=number: done.append(n))
    first = feeder.put(lambda: done.append("first"), first=True)
    gate.set()
    assert first.wait(LIMIT_S)
    assert last.wait(LIMIT_S)
    assert done == ["first", 0, 1, 2]
    feeder.stop(LIMIT_S)


def test_a_caller_does_not_wait_for_a_slow_job() -> None:
    feeder, gate, done = Feeder(nothing), threading.Event(), []
    first = feeder.put(lambda: gate.wait(LIMIT_S))
    second = feeder.put(lambda: done.append(1))
    assert not first.is_set()
    assert not done
    gate.set()
    assert second.wait(LIMIT_S)
    assert done == [1]
    feeder.stop(LIMIT_S)


def test_a_failure_is_contained_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    feeder = Feeder(nothing, describe=lambda error: f"described {error}")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert feeder.put(fail, anyway=True).wait(LIMIT_S)
    assert feeder.faults == 3
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "tracking pending: described refused (`ingot sync` completes it later)"
    ]
    feeder.stop(LIMIT_S)


def test_after_a_failure_the_door_is_closed_except_for_jobs_that_insist() -> None:
    feeder, seen = Feeder(nothing), []
    assert feeder.put(fail).wait(LIMIT_S)
    assert not feeder.open
    assert feeder.put(lambda: seen.append("dropped")).wait(LIMIT_S)
    assert feeder.put(lambda: seen.append("insisted"), anyway=True).wait(LIMIT_S)
    assert feeder.put(lambda: seen.append("welcome")).wait(LIMIT_S)
    assert seen == ["insisted", "welcome"]
    assert feeder.faults == 2
    feeder.stop(LIMIT_S)


def test_the_idle_job_runs_when_there_is_nothing_else() -> None:
    ran = threading.Event()
    feeder = Feeder(ran.set, every_s=0.01)
    assert ran.wait(LIMIT_S)
    feeder.stop(LIMIT_S)


def test_stopping_ends_the_thread() -> None:
    feeder = Feeder(nothing)
    feeder.stop(LIMIT_S)
    assert not any(t.name == "mlflow-feeder" and t is feeder._thread for t in threading.enumerate())


def test_a_slow_idle_job_is_done_less_often_than_it_takes() -> None:
    """Curves are told to a slow MLflow now and then: it is free for the jobs that a run waits for."""
    began: list[float] = []
    took_s = 0.05

    def idle() -> None:
        began.append(time.monotonic())
        time.sleep(took_s)

    feeder, third = Feeder(idle, every_s=0.001), threading.Event()
    while len(began) < 3:
        third.wait(0.01)
    feeder.stop(LIMIT_S)
    assert all(later - earlier >= 5 * took_s for earlier, later in pairwise(began))
