"""`ingot cancel`: a run ends with everything it started, and can be gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.run_record import Runs

CHECKOUT = Path(__file__).resolve().parents[3]


def test_what_is_not_at_work_cannot_be_cancelled(smoke_store: Path, run_in: Callable[..., Any]) -> None:
    refused = run_in(smoke_store, "cancel", check=2)
    assert "is not at work (done)" in refused.stderr


@pytest.mark.slow
def test_a_run_ends_within_seconds_with_all_that_it_started(
    tmp_path: Path, run_in: Callable[..., Any], environment_of: Callable[[Path], dict[str, str]]
) -> None:
    store = tmp_path / "store"
    command = [sys.executable, "-c", "from flows.cli import main; main()", "run", "--recipe", "smoke"]
    with (tmp_path / "out").open("wb") as out:
        flow = subprocess.Popen(command, cwd=CHECKOUT, env=environment_of(store), stdout=out, stderr=out)
    runs, deadline = Runs(store), time.monotonic() + 120
    while not any(node.state == "running" for run in runs.all() for node in run.nodes.values()):
        assert time.monotonic() < deadline
        assert flow.poll() is None, (tmp_path / "out").read_text()
        time.sleep(0.05)
    started = psutil.Process(flow.pid).children(recursive=True)
    begun = time.monotonic()
    told = json.loads(run_in(store, "cancel", "--json").stdout)
    assert flow.wait(20) in {75, -9}  # what takes longer than ten seconds to save is killed
    assert time.monotonic() - begun < 25  # of which the command's own start is the most
    assert told["state"] == "preempted"
    assert psutil.wait_procs(started, timeout=5)[1] == []
    assert runs.get(told["run"]).unfinished
