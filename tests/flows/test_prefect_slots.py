"""Slots of a global concurrency limit on a real server: who waits, for whom, and what is refused at once."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.prefect_process import CHECKOUT, DEADLINE_S, Server
from tests.flows.test_train_to_registry import COMMAND

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PRETRAIN = ["--recipe", "smoke", "--only", "pretrain", "pretrain.steps=1", "pretrain.schedule.warmup=0"]
PRETRAIN += ["pretrain.world_size=1", "compute.concurrency_limit=gpu"]


@contextlib.contextmanager
def started(server: Server, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    call = [*COMMAND, *arguments]
    with subprocess.Popen(call, cwd=CHECKOUT, env=server.environment, stdout=pipe, stderr=both, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def refused(server: Server, *arguments: str) -> str:
    with started(server, *arguments) as process:
        said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2, said
    return said


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError("".join(lines))


def test_a_stage_waits_for_slots_and_gives_them_back(smoke_store: Path, server: Server) -> None:
    shutil.copytree(smoke_store, server.environment["INGOT_STORE"])
    assert "the Prefect server has no such limit" in refused(server, *PRETRAIN)
    server.ask("POST", "/v2/concurrency_limits/", {"name": "gpu", "limit": 1})
    assert "'gpu' has 1 slots, and a stage of 2 ranks takes 2" in refused(server, *PRETRAIN, "pretrain.world_size=2")

    asked = {"names": ["gpu"], "slots": 1, "lease_duration": 300}
    lease = server.ask("POST", "/v2/concurrency_limits/increment-with-lease", asked)["lease_id"]
    with started(server, *PRETRAIN) as process:
        read_until(process, "pretrain: waiting for 1 of the slots of 'gpu'")
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 75, said
    with started(server, *PRETRAIN) as process:
        read_until(process, "pretrain: waiting for 1 of the slots of 'gpu'")
        server.ask("POST", "/v2/concurrency_limits/decrement-with-lease", {"lease_id": lease})
        said, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, said
    wanted = {"filter": {"event": {"prefix": ["prefect.concurrency-limit."]}}}
    server.wait(
        "Prefect tells of the slot's way",
        lambda: (
            {each["event"].rpartition(".")[2] for each in server.ask("POST", "/events/filter", wanted)["events"]}
            >= {"acquired", "released"}
        ),
    )
    assert server.ask("GET", "/v2/concurrency_limits/gpu")["active_slots"] == 0
