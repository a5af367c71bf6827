"""The graph as a Prefect flow: prepare -> pretrain -> compress (fan-out) -> evaluate -> promote.

Nodes run one after another: each uses the whole machine (or the whole launch of ranks), and latency is measured, so
two at a time would only disturb each other. What may run side by side on a cluster is left to `compute`.
"""

from __future__ import annotations

from prefect import flow

from flows import planner, recipe
from flows.console import progress_line
from flows.planner import Selection
from flows.runner import Execution, closing, open_execution
from flows.tasks import node_task, show_evaluations, show_plan
from pipelines.measure import intervals


@flow(name="train-to-registry", persist_result=False, log_prints=False)
def train_to_registry(
    recipe_name: str = "demo",
    overrides: list[str] | None = None,
    only: str | None = None,
    since: str | None = None,
    force: list[str] | None = None,
    wait_s: float | None = None,
) -> str:
    """Take a corpus to a champion.

    Args:
        recipe_name: a recipe that comes with the checkout, or the path of a TOML file.
        overrides: `dotted.path=value` settings laid over the recipe.
        only: run this stage (or node) alone, on the artifacts that exist.
        since: run this stage again, and everything below it.
        force: stages to run again even though nothing changed.
        wait_s: how long to wait for another run of the same stage; None waits for ever.

    Returns:
        The id of the run.
    """
    config = recipe.resolve(recipe_name, overrides or [])
    execution = open_execution(
        config,
        recipe=recipe_name,
        overrides=list(overrides or []),
        selection=Selection(only, since, tuple(force or ())),
        console=progress_line,
        wait_s=wait_s,
    )
    with closing(execution):
        steps = planner.make(execution.graph, execution.store, execution.selection)
        show_plan([step.as_dict() for step in steps], execution.session.url)
        for name in execution.wanted():
            if name == "promote":
                _compare(execution)
            node_task(execution, name)()
    return execution.record.id


def _compare(execution: Execution) -> None:
    """Show all evaluations in one table before the gate decides on them."""
    evaluations = {
        name.removeprefix("evaluate."): intervals.read(found.path)
        for name, found in execution.artifacts.items()
        if name.startswith("evaluate.")
    }
    if evaluations:
        show_evaluations(intervals.table(evaluations))
