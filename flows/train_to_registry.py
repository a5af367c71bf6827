"""The graph as a Prefect flow: a task for each node, with its inputs as edges, so that Prefect draws the real graph.

Truth about a stage is its manifest (DESIGN, rule 4), so Prefect's own result cache stays off: a task asks the store by
fingerprint and, when nothing ran, ends in a completed state called `Cached`.

Prefect is told and never asked: a server that goes away in mid-run changes nothing (see `prefect_client.py`).

With `compute.parallel = 1` the tasks run one after another in the main thread: each uses the whole machine (or the
whole launch of ranks), signals reach the stage itself, and torch is imported once. With more, every task waits in a
thread for its executor, and is submitted when its inputs are there; a node that measures time has the machine for
itself: the run where all work on one, else by asking the scheduler for it.
"""

from __future__ import annotations

import contextlib
import queue
import re
import time
from collections.abc import Collection, Iterator
from typing import Any

from prefect import Task, flow, get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture
from prefect.states import Completed

from flows import prefect_client, prefect_events, prefect_slots, preflight, run_plan
from flows.console import progress_line
from flows.planner import Selection, Step
from flows.run_plan import RunPlan
from flows.runner import Execution, closing, open_execution
from pipelines.core import stop
from pipelines.core.artifact import Artifact
from pipelines.core.errors import DiskFullError, GateRefused, IngotError, Preempted, TransientError
from pipelines.core.redaction import redact_override
from pipelines.core.stage import Progress

FLOW_NAME = "train-to-registry"
_PROGRESS_EVERY_S = 5.0


@flow(name=FLOW_NAME, persist_result=False, log_prints=False)
def train_to_registry(
    recipe_name: str | None = None,
    overrides: list[str] | None = None,
    only: str | None = None,
    since: str | None = None,
    force: list[str] | None = None,
    wait_s: float | None = None,
    keep_going: bool = False,
) -> str:
    """Take a corpus to a champion; what a deployment runs.

    Args:
        recipe_name: a recipe by name, or the path of a TOML file; the project's own if left out.
        overrides: `dotted.path=value` settings laid over the recipe.
        only: run this stage (or node) alone, on the artifacts that exist.
        since: run this stage again, and everything below it.
        force: stages to run again even though nothing changed.
        wait_s: how long to wait for another run of the same stage; None waits for ever.
        keep_going: run on what needs nothing that failed.

    Returns:
        The id of the run.
    """
    selection = Selection(only, since, tuple(force or ()), keep_going=keep_going)
    plan = run_plan.make(recipe_name, overrides or [], selection)
    if not plan.is_done():
        preflight.refuse(preflight.check(plan))
    return _carry_out(plan, wait_s)


def run_planned(plan: RunPlan, wait_s: float | None = None, *, server: str | None = None) -> str:
    """Run the same flow on a plan that was made already, in this process; return the id of the run.

    Args:
        plan: what to run.
        wait_s: how long to wait for another run of the same stage; None waits for ever.
        server: address of the Prefect server that is told; None for none.
    """

    @flow(name=FLOW_NAME, persist_result=False, log_prints=False)
    def planned(
        recipe_name: str,
        overrides: list[str],
        only: str | None,
        since: str | None,
        force: list[str],
        wait_s: float | None,
    ) -> str:
        del recipe_name, overrides, only, since, force  # what Prefect shows of the run; the plan was made of them
        return _carry_out(plan, wait_s)

    asked = plan.selection
    with stop.unwinding(), _as_preempted(), contextlib.nullcontext() if server else prefect_client.alone():
        overrides = [redact_override(each) for each in plan.overrides]
        return planned(plan.recipe, overrides, asked.only, asked.since, list(asked.force), wait_s)


def _carry_out(plan: RunPlan, wait_s: float | None) -> str:
    prefect_client.tolerate()
    prefect_slots.check(plan)
    try:
        with contextlib.ExitStack() as at_work:
            at_work.enter_context(stop.unwinding())
            with stop.held():
                execution = open_execution(plan, console=progress_line, wait_s=wait_s)
                execution.slot = prefect_slots.held
                at_work.enter_context(closing(execution))
                at_work.enter_context(_as_preempted())
            stop.check()
            prefect_client.name_flow_run(execution.record.id)
            _show_plan(plan.steps, execution.session.url)
            try:
                if plan.config.compute.parallel == 1:
                    _one_by_one(execution)
                else:
                    _side_by_side(execution)
            except BaseException:
                with stop.held():
                    execution.executor.stop()
                raise
    except GateRefused as error:
        about = {"run": execution.record.id, "reason": str(error)}
        prefect_events.tell(prefect_events.REFUSED, f"model.{plan.config.promote.model_name}", about)
        raise
    except Preempted as error:
        if isinstance(error.__cause__, TerminationSignal):
            raise error.__cause__ from None  # Prefect tells a cancelled from a crashed run by it
        raise
    _tell_promotion(execution)
    return execution.record.id


def _tell_promotion(execution: Execution) -> None:
    node = execution.record.nodes.get("promote")
    if node is not None and node.state == "done":
        about = {"run": execution.record.id, **node.summary}
        prefect_events.tell(prefect_events.PROMOTED, f"model.{node.summary['model']}", about)


@contextlib.contextmanager
def _as_preempted() -> Iterator[None]:
    """Turn what Prefect's own SIGTERM handler raises into ours: the record says `preempted` in any case."""
    try:
        yield
    except TerminationSignal as error:
        raise Preempted("the run was asked to stop", hint="the same command goes on where it stopped") from error


def _one_by_one(execution: Execution) -> None:
    states: dict[str, State[Any]] = {}
    for name in execution.plan.wanted():
        if name in _startable(execution, [name], states):
            states[name] = _node_task(execution, name)(wait_for=_edges(execution, name, states), return_state=True)
    _raise_errors(states)


def _side_by_side(execution: Execution) -> None:
    """Submit every node as soon as its inputs are there; what may not start any more is not waited for."""
    waiting, at_work = execution.plan.wanted(), set[str]()
    states: dict[str, State[Any]] = {}
    ended: queue.SimpleQueue[tuple[str, PrefectFuture[Any]]] = queue.SimpleQueue()
    while (waiting := _startable(execution, waiting, states)) or at_work:
        for name in waiting:
            if _may_start(execution, name, waiting, at_work):
                future = _node_task(execution, name).submit(wait_for=_edges(execution, name, states))
                at_work.add(name)
                future.add_done_callback(lambda done, name=name: ended.put((name, done)))
        waiting = [name for name in waiting if name not in at_work]
        name, done = ended.get()
        done.wait()
        states[name] = done.state
        at_work.discard(name)
    _raise_errors(states)


def _startable(execution: Execution, names: Collection[str], states: dict[str, State[Any]]) -> list[str]:
    """Return the nodes that errors so far leave to be run.

    These are none, or with `--keep-going` those that need nothing that failed; a stopped run starts nothing more.
    """
    failed = {name for name, state in states.items() if not state.is_completed()}
    errors = [states[name].result(raise_on_failure=False) for name in failed]
    stopped = any(isinstance(error, Preempted) or not isinstance(error, Exception) for error in errors)
    if failed and (stopped or not execution.plan.selection.keep_going):
        return []
    for name in execution.plan.wanted():
        if failed.intersection(execution.plan.graph[name].node.inputs.values()):
            failed.add(name)
    return [name for name in names if name not in failed]


def _raise_errors(states: dict[str, State[Any]]) -> None:
    """Raise the error of the node that failed; of several, the first with what became of all."""
    errors = {name: state for name, state in states.items() if not state.is_completed()}
    if len(errors) <= 1 or any(not isinstance(_error_of(state), IngotError) for state in errors.values()):
        for state in errors.values():
            state.result()
        return
    first = _error_of(next(iter(errors.values())))
    raise type(first)("\n".join(f"{name}: {_error_of(state)}" for name, state in errors.items())) from first


def _error_of(state: State[Any]) -> Any:
    return state.result(raise_on_failure=False)


def _may_start(execution: Execution, name: str, waiting: Collection[str], at_work: Collection[str]) -> bool:
    graph = execution.plan.graph
    if len(at_work) >= execution.plan.config.compute.parallel:
        return False
    if set(graph[name].node.inputs.values()) & {*waiting, *at_work}:
        return False
    alone = any(graph[other].node.config.measures_time for other in (name, *at_work))
    return not (alone and at_work and execution.executor.one_machine)


def _edges(execution: Execution, name: str, states: dict[str, State[Any]]) -> list[State[Any]]:
    """Return the states of the tasks whose artifacts a node reads; stages left out by `--only` have none."""
    return [states[source] for source in execution.plan.graph[name].node.inputs.values() if source in states]


def _node_task(execution: Execution, name: str) -> Task[Any, Any]:
    """Return the Prefect task that executes one node of the graph."""
    compute = execution.plan.config.compute

    def run() -> State[Any]:
        try:
            if rows := execution.preview(name):
                create_table_artifact(rows, key=_key_of(name, "inputs"), description=f"What {name} is about to read")
            progress = _ProgressShown(name)
            artifact, cached = execution.execute(name, progress)
            progress.finish()
        except BaseException as error:
            execution.failed(name, error)
            raise
        _show_summary(name, artifact)
        message = f"{artifact.manifest.fingerprint} in {artifact.place}"
        # Prefect knows results by their address in memory: one that is gone would give its edges to another's inputs.
        return Completed(name="Cached" if cached else "Completed", message=message, data=True)

    return Task(
        run,
        name=name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=compute.retries,
        retry_delay_seconds=[compute.retry_delay_s * 2**n for n in range(compute.retries)],
        retry_condition_fn=_may_pass,
        log_prints=False,
    )


def _may_pass(_task: Task[Any, Any], _run: TaskRun, state: State[Any]) -> bool:
    """Retry only faults that can pass; bad configuration, broken bytes and full disks stay as they are."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, TransientError) and not isinstance(error, DiskFullError)


class _ProgressShown:
    """Progress in the Prefect UI, at most every few seconds: a bar, and a line in the log of the task.

    Args:
        node: name of the node that works.
    """

    def __init__(self, node: str) -> None:
        self._node = node
        self._id: Any = None
        self._updated_at = 0.0

    def __call__(self, progress: Progress) -> None:
        """Show a progress report."""
        now = time.monotonic()
        if now - self._updated_at <= _PROGRESS_EVERY_S and progress.done < progress.total:
            return
        percent = 100.0 * progress.done / max(progress.total, 1)
        self._show(percent, f"{self._node}: {progress.message}")
        get_run_logger().info("%d/%d %s  %s", progress.done, progress.total, progress.unit, progress.message)
        self._updated_at = now

    def finish(self) -> None:
        """Show that the node is done: the last report of a stage need not be its last."""
        if self._id is not None:
            self._show(100.0, f"{self._node}: done")

    def _show(self, percent: float, description: str) -> None:
        if self._id is None:
            self._id = create_progress_artifact(percent, key=_key_of(self._node, "progress"), description=description)
        else:
            update_progress_artifact(self._id, percent, description=description)


def _show_plan(steps: Collection[Step], tracking_url: str | None) -> None:
    """Show the plan and the link to MLflow in the Prefect UI."""
    lines = ["| stage | state | why |", "|---|---|---|"]
    lines += [f"| {step.node} | {step.state} | {step.why} |" for step in steps]
    create_markdown_artifact("\n".join(lines), key="plan", description="What this run does, and why")
    if tracking_url is not None:
        create_link_artifact(tracking_url, link_text="Run in MLflow", key="mlflow", description="Metrics and models")


def _show_summary(name: str, artifact: Artifact) -> None:
    facts = [{"fact": key, "value": str(value)} for key, value in artifact.manifest.summary.items()]
    if facts:
        create_table_artifact(facts, key=_key_of(name), description=f"{name} {artifact.manifest.fingerprint[:8]}")


def _key_of(*parts: str) -> str:
    """Return an artifact key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
