"""This machine. One stage at a time runs in this process; several run in a process each.

Children, not threads, because signal handlers, torch's threads, progress bars and the parent-death signal of ranks
belong to a process. A child starts in about as long as it takes to import torch, so one at a time stays here.
Children inherit the number of threads: fewer would be faster side by side, and would round sums in another order.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.core import artifact, errors, parent_guard, program, run_stage
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import BY_EXIT_CODE, IngotError, Preempted, TransientError
from pipelines.core.request import StageRequest
from pipelines.core.stage import Progress

_MARGIN_S = 15.0
"""What a child may need beyond the grace time of its ranks."""


class Executor:
    """Carries requests out on this machine.

    Args:
        compute: of the run.
    """

    def __init__(self, compute: ComputeConfig) -> None:
        self._compute = compute
        self._children: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopping = False

    def execute(self, request: StageRequest, report: Callable[[Progress], None]) -> Artifact:
        """Execute in this process, or in a child when several may work side by side."""
        if self._compute.parallel == 1:
            return run_stage.execute(request, report)
        child = self._start()
        try:
            return _follow(child, request, report)
        finally:
            _kill(child)
            with self._lock:
                self._children.discard(child)

    def stop(self) -> None:
        """Send SIGTERM to the children, wait until they have saved, and kill the ones that take too long."""
        with self._lock:
            self._stopping = True
            children = list(self._children)
        for child in children:
            child.terminate()
        try:
            for child in children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(self._compute.grace_s + _MARGIN_S)
        finally:  # also when a second signal arrives meanwhile
            for child in children:
                _kill(child)

    def _start(self) -> subprocess.Popen[str]:
        guarded = [sys.executable, "-I", "-S", parent_guard.__file__, "exec", str(os.getpid())]
        with self._lock:
            if self._stopping:
                raise Preempted("the run was asked to stop", hint="the same command goes on where it stopped")
            child = subprocess.Popen(
                [*guarded, *program.command("pipelines.core.run_stage", "-")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=program.environment(),
                start_new_session=True,  # the terminal's Ctrl-C reaches this process, which passes it on once
                text=True,
            )
            self._children.add(child)
        return child


def _follow(child: subprocess.Popen[str], request: StageRequest, report: Callable[[Progress], None]) -> Artifact:
    """Hand the request over, pass progress on, and return the artifact or raise the child's error as it was there."""
    assert child.stdin is not None
    assert child.stdout is not None
    # Where the child is dead already, its exit code says how.
    with contextlib.suppress(BrokenPipeError), child.stdin as stream:
        stream.write(request.model_dump_json())
    last: dict[str, Any] = {}
    with child.stdout as lines:
        for line in lines:
            last = json.loads(line)
            if last.pop("event") == "progress":
                report(Progress(request.node, **last))
    code = child.wait()
    if code == 0:
        return artifact.load(Path(last["path"]))
    if "kind" in last:
        raise getattr(errors, last["kind"])(last["message"], hint=last["hint"])
    if code < 0:
        raise TransientError(f"the process of {request.node} was killed by {signal.Signals(-code).name}")
    raise BY_EXIT_CODE.get(code, IngotError)(f"the process of {request.node} ended with exit code {code}")


def _kill(child: subprocess.Popen[str]) -> None:
    """End a child with all that it started, if it is still there."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
