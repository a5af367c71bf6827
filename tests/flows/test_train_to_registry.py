"""The flow as Prefect sees it: tasks with their inputs as edges, side by side where they may, stopped by a signal."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.run_record import Runs
from pipelines.core import artifact
from tests.flows.prefect_process import Server

CHECKOUT = Path(__file__).resolve().parents[2]
Ingot = Callable[..., subprocess.CompletedProcess[str]]
COMMAND = [sys.executable, "-c", "from flows.cli import main; main()", "run"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def on_server(server: Server, *arguments: str) -> dict[str, dict[str, Any]]:
    """Run a command on the server; return its task runs by node."""
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=CHECKOUT, env=server.environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    newest = {"sort": "START_TIME_DESC", "limit": 1}
    (run,) = server.ask("POST", "/flow_runs/filter", newest)
    return {task["name"].rsplit("-", 1)[0]: task for task in server.task_runs(run["id"])}


@pytest.mark.parametrize("parallel", [1, 2])
def test_prefect_draws_the_graph(smoke_store: Path, server: Server, parallel: int) -> None:
    shutil.copytree(smoke_store, server.environment["INGOT_STORE"])
    tasks = on_server(server, "--recipe", "smoke", "--force", "promote", f"compute.parallel={parallel}")
    names = {task["id"]: name for name, task in tasks.items()}
    edges = {
        name: {names[each["id"]] for each in task["task_inputs"].get("wait_for", [])} for name, task in tasks.items()
    }
    model, evaluated = "compress.rtn-int8-channel", "evaluate.rtn-int8-channel"
    assert edges == {
        "prepare": set(),
        "pretrain": {"prepare"},
        "evaluate.pretrain": {"prepare", "pretrain"},
        "pretrain.adamw": {"prepare"},
        "compare.adamw": {"prepare", "pretrain.adamw", "pretrain", "evaluate.pretrain"},
        model: {"prepare", "pretrain"},
        evaluated: {"prepare", model, "pretrain", "evaluate.pretrain"},
        "promote": {"prepare", "pretrain", "evaluate.pretrain", model, evaluated},
    }
    assert {name: task["state"]["name"] for name, task in tasks.items()} == {
        name: "Completed" if name == "promote" else "Cached" for name in edges
    }
    run = server.ask("GET", f"/flow_runs/{tasks['promote']['flow_run_id']}")
    assert run["name"] == Runs(Path(server.environment["INGOT_STORE"])).get().id
    (bar,) = server.ask("POST", "/artifacts/filter", {"artifacts": {"key": {"any_": ["promote-progress"]}}})
    assert bar["data"] == 100.0
    of_the_task = {"logs": {"task_run_id": {"any_": [tasks["promote"]["id"]]}}}
    assert any("models" in line["message"] for line in server.ask("POST", "/logs/filter", of_the_task))


def test_independent_nodes_overlap_and_give_the_bytes_of_one_after_the_other(
    smoke_store: Path, server: Server, tmp_path: Path
) -> None:
    recipe = tmp_path / "two.toml"
    shared = 'extends = "smoke"\n'
    variants = '[[compress]]\nmethod = "rtn"\nbits = 4\n[[compress]]\nmethod = "gptq"\nbits = 4\nsamples = 8\n'
    recipe.write_text(shared + variants)
    made, spans = {}, {}
    for parallel in (1, 2):
        store = tmp_path / f"store-{parallel}"
        shutil.copytree(smoke_store, store)
        server.environment["INGOT_STORE"] = str(store)
        tasks = on_server(server, "--recipe", str(recipe), "--only", "compress", f"compute.parallel={parallel}")
        spans[parallel] = [(task["start_time"], task["end_time"]) for task in tasks.values()]
        nodes = Runs(store).get().nodes
        done = [node for node in nodes.values() if node.state == "done"]
        made[parallel] = [artifact.load(Path(str(node.artifact))).digest for node in done]
    assert len(made[1]) == 2
    assert made[1] == made[2]
    (one, two), (first, second) = spans[1], spans[2]
    assert one[1] <= two[0]
    assert second[0] < first[1]


@pytest.mark.parametrize("parallel", [1, 2])
def test_sigterm_ends_a_run_with_75_and_the_same_command_goes_on(
    smoke_store: Path,
    empty_store: Path,
    run_in: Ingot,
    environment_of: Callable[[Path], dict[str, str]],
    parallel: int,
    tmp_path: Path,
) -> None:
    shutil.copytree(smoke_store / "artifacts" / "prepare", empty_store / "artifacts" / "prepare")
    arguments = ["--recipe", "smoke", "--only", "pretrain", f"compute.parallel={parallel}"]
    faults = tmp_path / "faults.json"  # a rank that waits long enough for the signal to find it at work
    faults.write_text(
        json.dumps([{"point": "train.after_step", "rank": 0, "step": 25, "action": "delay", "seconds": 3}])
    )
    log = tmp_path / "run.log"
    with log.open("wb") as stream:
        environment = environment_of(empty_store) | {"INGOT_FAULTS": str(faults)}
        process = subprocess.Popen([*COMMAND, *arguments], cwd=CHECKOUT, env=environment, stdout=stream, stderr=stream)
        deadline = time.monotonic() + 240
        while not list(empty_store.glob("scratch/pretrain-*/**/step-*20/manifest.json")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75, log.read_text()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == []
    assert "Traceback" not in log.read_text()
    assert Runs(empty_store).get().status == "preempted"
    run_in(empty_store, "run", *arguments, check=0)
    (model,) = empty_store.glob("artifacts/pretrain/*/model/model.safetensors")
    undisturbed = smoke_store / model.relative_to(empty_store)  # beside it lies that of the other optimizer
    assert model.read_bytes() == undisturbed.read_bytes()
