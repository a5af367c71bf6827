"""Stages as Prefect tasks: names, retries by error class, cached states, and artifacts in the Prefect UI.

Truth about a stage is its manifest (DESIGN, rule 4), so Prefect's own result cache stays off: a task asks the store by
fingerprint and, when nothing ran, ends in a completed state called `Cached`.
"""

from __future__ import annotations

import re
import time
from typing import Any

from prefect import Task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed

from flows.runner import Execution
from pipelines.core.artifact import Artifact
from pipelines.core.errors import DiskFullError, TransientError
from pipelines.core.stage import Progress

_PROGRESS_EVERY_S = 5.0


class ProgressArtifact:
    """A progress bar in the Prefect UI, updated at most every few seconds.

    Args:
        node: name of the node that works.
    """

    def __init__(self, node: str) -> None:
        self._node = node
        self._id: Any = None
        self._updated_at = 0.0

    def __call__(self, progress: Progress) -> None:
        """Show a progress report."""
        percent = 100.0 * progress.done / max(progress.total, 1)
        now = time.monotonic()
        if self._id is None:
            self._id = create_progress_artifact(percent, key=key_of(self._node, "progress"), description=self._node)
        elif now - self._updated_at > _PROGRESS_EVERY_S or progress.done >= progress.total:
            update_progress_artifact(self._id, percent, description=f"{self._node}: {progress.message}")
        else:
            return
        self._updated_at = now


def node_task(execution: Execution, name: str) -> Task[Any, Any]:
    """Return the Prefect task that executes one node of the graph."""
    compute = execution.config.compute

    def run() -> State[Any]:
        try:
            found, cached = execution.execute(name, ProgressArtifact(name))
        except BaseException as error:
            execution.failed(name, error)
            raise
        _show(name, found)
        facts = {"fingerprint": found.manifest.fingerprint, "digest": found.digest, "path": str(found.path)}
        return Completed(
            name="Cached" if cached else "Completed", message=f"{name} {facts['fingerprint'][:8]}", data=facts
        )

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


def show_plan(rows: list[dict[str, Any]], tracking_url: str | None) -> None:
    """Show the plan and the link to MLflow in the Prefect UI."""
    lines = ["| stage | state | why |", "|---|---|---|"]
    lines += [f"| {row['node']} | {row['state']} | {row['why']} |" for row in rows]
    create_markdown_artifact("\n".join(lines), key="plan", description="What this run does, and why")
    if tracking_url is not None:
        create_link_artifact(tracking_url, link_text="Run in MLflow", key="mlflow", description="Metrics and models")


def show_evaluations(rows: list[dict[str, Any]]) -> None:
    """Show the table of parent and children in the Prefect UI."""
    create_table_artifact(rows, key="evaluation", description="Parent and children on the held-out split")


def key_of(*parts: str) -> str:
    """Return an artifact key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def _show(name: str, found: Artifact) -> None:
    facts = [{"fact": key, "value": str(value)} for key, value in found.manifest.summary.items()]
    if facts:
        create_table_artifact(facts, key=key_of(name), description=f"{name} {found.manifest.fingerprint[:8]}")


def _may_pass(_task: Task[Any, Any], _run: TaskRun, state: State[Any]) -> bool:
    """Retry only faults that can pass; bad configuration, broken bytes and full disks stay as they are."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, TransientError) and not isinstance(error, DiskFullError)
