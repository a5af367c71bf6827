"""After a stage failed: nothing more starts, or with `--keep-going` what needs nothing that failed. Prefect is real."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from prefect import flow

from flows import prefect_client, train_to_registry
from flows.executors.local import Executor
from flows.planner import Selection
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import DiskFullError, IngotError, IntegrityError, NumericError, Preempted

EDGES = {"data": (), "a": ("data",), "b": ("data",), "a2": ("a",), "b2": ("b",), "end": ("a2", "b2")}


class World:
    """An execution of a small graph, some of whose nodes fail.

    Args:
        failing: node -> its error.
        parallel: nodes at work side by side.
        keep_going: of the selection.
    """

    def __init__(self, failing: dict[str, Exception], parallel: int, *, keep_going: bool) -> None:
        self.failing, self.began = failing, list[str]()
        config = SimpleNamespace(measures_time=False)
        self.plan = SimpleNamespace(
            graph={
                name: SimpleNamespace(node=SimpleNamespace(inputs={each: each for each in inputs}, config=config))
                for name, inputs in EDGES.items()
            },
            wanted=lambda: list(EDGES),
            selection=Selection(keep_going=keep_going),
            config=SimpleNamespace(compute=ComputeConfig(parallel=parallel, retries=0)),
        )
        self.executor = Executor(self.plan.config.compute)

    def preview(self, _name: str) -> list[Any]:
        """Return no table."""
        return []

    def execute(self, name: str, _listen: Any) -> tuple[Any, bool]:
        """Fail, or return an artifact."""
        self.began.append(name)
        if name in self.failing:
            raise self.failing[name]
        return SimpleNamespace(manifest=SimpleNamespace(summary={}, fingerprint=name), place=name), False

    def failed(self, name: str, error: BaseException) -> None:
        """Take note of nothing."""

    def run(self) -> Exception | None:
        """Run the graph as a flow; return the error that it ends with."""
        walk = (
            train_to_registry._one_by_one if self.plan.config.compute.parallel == 1 else train_to_registry._side_by_side
        )

        @flow(name="small")
        def small() -> None:
            walk(cast("Any", self))

        try:
            with prefect_client.alone():
                small()
        except IngotError as error:
            return error
        return None


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_LOGGING_TO_API_ENABLED", "false")


@pytest.mark.parametrize("parallel", [1, 2])
def test_what_needs_nothing_that_failed_is_run(parallel: int) -> None:
    world = World({"a": IntegrityError("damaged", hint="repair it")}, parallel, keep_going=True)
    error = world.run()
    assert sorted(world.began) == ["a", "b", "b2", "data"]
    assert type(error) is IntegrityError
    assert str(error) == "damaged\n  -> repair it"


def test_without_it_nothing_more_starts() -> None:
    world = World({"a": IntegrityError("damaged")}, 1, keep_going=False)
    assert type(world.run()) is IntegrityError
    assert world.began == ["data", "a"]


def test_several_errors_are_told_at_once_and_the_first_decides_the_exit_code() -> None:
    world = World({"a": NumericError("nan", hint="lower it"), "b2": DiskFullError("full")}, 1, keep_going=True)
    error = world.run()
    assert world.began == ["data", "a", "b", "b2"]
    assert type(error) is NumericError
    assert str(error) == "a: nan\n  -> lower it\nb2: full"


def test_a_stopped_run_starts_nothing_more() -> None:
    world = World({"a": Preempted("stopped")}, 1, keep_going=True)
    assert type(world.run()) is Preempted
    assert world.began == ["data", "a"]
