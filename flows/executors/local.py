"""This machine. One stage at a time runs in this process; several run in a process each.

Children, not threads, because signal handlers, torch's threads, progress bars and the parent-death signal of ranks
belong to a process. A child starts in about as long as it takes to import torch, so one at a time stays here.
Children inherit the number of threads: fewer would be faster side by side, and would round sums in another order.
No child outlives this process, so there is never one to adopt.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from flows import executors
from flows.executors import EVENTS, Job, Status
from pipelines.core import boundary, parent_guard, program, run_stage
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.request import StageRequest
from pipelines.core.stage import Progress

_MARGIN_S = 15.0
"""What a child may need beyond the grace time of its ranks."""


class Executor(executors.Executor):
    """Carries requests out on this machine.

    Args:
        compute: of the run.
    """

    one_machine: ClassVar[bool] = True

    def __init__(self, compute: ComputeConfig) -> None:
        super().__init__(compute)
        self._children: dict[str, subprocess.Popen[str]] = {}

    def execute(self, request: StageRequest, report: Callable[[Progress], None]) -> Artifact:
        """Execute in this process, or in a child when several may work side by side."""
        if self._compute.parallel == 1:
            with boundary.explained():
                return run_stage.execute(request, report)
        return super().execute(request, report)

    def submit(self, request: StageRequest) -> Job:
        """Start a child, which gets the request by its standard input."""
        folder = Path(tempfile.mkdtemp(prefix="ingot-job-"))
        guarded = parent_guard.command()
        with (folder / EVENTS).open("wb") as events:
            child = subprocess.Popen(
                [*guarded, *program.command("pipelines.core.run_stage", "-")],
                stdin=subprocess.PIPE,
                stdout=events,
                env=program.environment(),
                start_new_session=True,  # the terminal's Ctrl-C reaches this process, which passes it on once
                text=True,
            )
        self._children[str(child.pid)] = child
        assert child.stdin is not None
        # Where the child is dead already, its exit code says how.
        with contextlib.suppress(BrokenPipeError), child.stdin as stream:
            stream.write(request.model_dump_json())
        return Job(str(child.pid), request, folder)

    def poll(self, job: Job) -> Status:
        """Return whether the child has ended, and how."""
        code = self._children[job.id].poll()
        return Status("runs") if code is None else Status("ended", code)

    def cancel(self, jobs: Sequence[Job], grace_s: float) -> None:
        """Send SIGTERM to the children, wait until they have saved, and kill the ones that take too long."""
        children = [self._children[job.id] for job in jobs if job.id in self._children]
        for child in children:
            child.terminate()
        deadline = time.monotonic() + grace_s + _MARGIN_S
        try:
            for child in children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.0, deadline - time.monotonic()))
        finally:  # also when a second signal arrives meanwhile
            for child in children:
                _kill(child)

    def logs(self, job: Job) -> str:
        """Return nothing: a child shares the standard error of this process."""
        del job
        return ""

    def adopt(self, request: StageRequest) -> Job | None:
        """Return None: a child does not outlive the run that started it."""
        del request
        return None

    def release(self, job: Job, done: bool) -> None:
        """End the child with all that it started, if it is still there."""
        del done
        _kill(self._children.pop(job.id))
        shutil.rmtree(job.folder, ignore_errors=True)


def _kill(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
