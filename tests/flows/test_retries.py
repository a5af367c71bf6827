"""What is tried again, how often and how soon; what may work side by side. Prefect is real, the stages are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from prefect import flow

from flows import prefect_client, train_to_registry
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import DiskFullError, GateRefused, IngotError, IntegrityError, TransientError


class Execution:
    """One node that fails a few times.

    Args:
        errors: of its attempts, in order; then it succeeds.
        retries: of the recipe.
    """

    def __init__(self, errors: list[Exception], retries: int) -> None:
        self.errors, self.attempts, self.noted = errors, 0, list[str]()
        self.plan = SimpleNamespace(
            config=SimpleNamespace(compute=ComputeConfig(retries=retries, retry_delay_s=0.01)),
            graph={"node": SimpleNamespace(node=SimpleNamespace(inputs={}))},
        )

    def preview(self, _name: str) -> list[Any]:
        """Return no table."""
        return []

    def execute(self, name: str, _listen: Any) -> tuple[Any, bool]:
        """Fail as often as there are errors."""
        self.attempts += 1
        if self.attempts <= len(self.errors):
            raise self.errors[self.attempts - 1]
        return SimpleNamespace(manifest=SimpleNamespace(summary={}, fingerprint=name), place=name), False

    def failed(self, name: str, error: BaseException) -> None:
        """Take note."""
        self.noted.append(f"{name}: {error}")

    def run(self) -> IngotError | None:
        """Run the node as a task of a flow; return the error that it ends with."""
        task = train_to_registry._node_task(cast("Any", self), "node")

        @flow(name="small")
        def small() -> None:
            task()

        try:
            with prefect_client.alone():
                small()
        except IngotError as error:
            return error
        return None


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_LOGGING_TO_API_ENABLED", "false")


def test_a_fault_that_passes_is_tried_again_and_each_attempt_is_noted() -> None:
    execution = Execution([TransientError("gone"), TransientError("still gone")], retries=2)
    assert execution.run() is None
    assert execution.attempts == 3
    assert execution.noted == ["node: gone", "node: still gone"]


def test_a_fault_that_stays_ends_after_so_many_retries_with_its_last_error() -> None:
    execution = Execution([TransientError(f"attempt {number}") for number in range(1, 9)], retries=2)
    error = execution.run()
    assert isinstance(error, TransientError)
    assert (execution.attempts, error.message) == (3, "attempt 3")


@pytest.mark.parametrize("error", [DiskFullError("full"), IntegrityError("damaged"), GateRefused("worse")])
def test_what_cannot_pass_is_not_tried_again(error: IngotError) -> None:
    execution = Execution([error], retries=2)
    assert execution.run() is error
    assert execution.attempts == 1


def test_each_retry_waits_twice_as_long() -> None:
    execution = Execution([], retries=3)
    assert train_to_registry._node_task(cast("Any", execution), "node").retry_delay_seconds == [0.01, 0.02, 0.04]


@pytest.mark.parametrize(
    ("name", "at_work", "one_machine", "may"),
    [
        ("plain", set(), True, True),
        ("plain", {"other"}, True, True),
        ("timed", set(), True, True),
        ("timed", {"other"}, True, False),
        ("plain", {"timed"}, True, False),
        ("timed", {"other"}, False, True),
        ("plain", {"other", "third"}, True, False),
        ("reader", {"other"}, True, False),
    ],
)
def test_what_measures_time_has_the_machine_for_itself(
    name: str, at_work: set[str], *, one_machine: bool, may: bool
) -> None:
    def node(*inputs: str, timed: bool = False) -> Any:
        config = SimpleNamespace(measures_time=timed)
        return SimpleNamespace(node=SimpleNamespace(inputs={each: each for each in inputs}, config=config))

    graph = {"plain": node(), "other": node(), "third": node(), "timed": node(timed=True), "reader": node("other")}
    plan = SimpleNamespace(graph=graph, config=SimpleNamespace(compute=ComputeConfig(parallel=2)))
    execution = SimpleNamespace(plan=plan, executor=SimpleNamespace(one_machine=one_machine))
    assert train_to_registry._may_start(cast("Any", execution), name, [name], at_work) is may
