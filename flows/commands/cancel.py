"""cancel: end a run on every machine that it works on, and keep what it can go on from."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time

from flows import executors
from flows.commands import lookup
from flows.executors import Executor, Job
from flows.run_record import RunRecord, Runs
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import ConfigError, Preempted
from pipelines.core.request import StageRequest

_OVER = {"done", "cached"}
_KILL_S = 5.0


def cancel(run_id: str | None, grace_s: float, *, as_json: bool) -> None:
    """End a run: its own process, and its jobs also where that was killed before.

    Args:
        run_id: the run; None for the newest.
        grace_s: how long stages may take to save; what takes longer is killed, and the checkpoint before that counts.
        as_json: print JSON.

    Raises:
        ConfigError: it has ended and has no jobs, or works on another machine by itself.
    """
    runs = Runs(lookup.store().root)
    record = runs.get(run_id)
    executor = executors.get(ComputeConfig.model_validate(record.config["compute"]))
    was_at_work, deadline = record.at_work, time.monotonic() + grace_s
    elsewhere = record.process is not None and record.process.host != socket.gethostname()
    if was_at_work and elsewhere and executor.one_machine:
        raise ConfigError(f"{record.id} works as {record.process}", hint="cancel it there")
    if was_at_work and not elsewhere:
        _end(record, grace_s)
    jobs = _jobs(executor, record)
    if jobs:
        executor.cancel(jobs, max(1.0, deadline - time.monotonic()))
    if not (was_at_work or jobs):
        raise ConfigError(f"{record.id} is not at work ({record.state})", hint="`ingot list runs`")
    record = runs.get(record.id)
    if record.status == "running" and not record.at_work:
        runs.finish(record, "preempted", Preempted.exit_code, "cancelled")
    found = {"run": record.id, "state": record.state, "jobs": [job.id for job in jobs]}
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        cancelled = f", and its jobs {', '.join(found['jobs'])}" if jobs else ""
        print(f"{record.id} was ended{cancelled}. `ingot resume {record.id}` goes on with it.")


def _end(record: RunRecord, grace_s: float) -> None:
    """Ask the process of a run to end, and kill it when it takes too long; its ranks and children die with it."""
    assert record.process is not None
    for signum, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILL_S)):
        if record.process.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.process.pid, signum)
        deadline, pause = time.monotonic() + patience_s, threading.Event()
        while record.process.alive() and time.monotonic() < deadline:
            pause.wait(0.05)


def _jobs(executor: Executor, record: RunRecord) -> list[Job]:
    """Return the jobs of the nodes that have not ended, whoever waits for them."""
    asked = [
        StageRequest(
            stage=node.stage,
            node=name,
            fingerprint=node.fingerprint,
            configuration={},
            inputs={},
            data_hash=None,
            store=lookup.store().address,
            project=record.project,
        )
        for name, node in record.nodes.items()
        if node.state not in _OVER
    ]
    return [job for each in asked if (job := executor.adopt(each)) is not None]
