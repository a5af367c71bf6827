"""The shipped deployment on a real Prefect server, run by a real process worker: first it works, then all is cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.core.store import LocalStore
from tests.flows.prefect_process import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def completed(server: Server, deployment: str, **parameters: Any) -> list[tuple[str, str]]:
    """Have a worker run a deployment to its end; returns (task, state) of the flow run, in order of their start."""
    run = server.ask("POST", f"/deployments/{deployment}/create_flow_run", {"parameters": parameters})

    def ended() -> Any:
        state = server.ask("GET", f"/flow_runs/{run['id']}")["state"]
        return state if state["type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"} else None

    state = server.wait("the flow run ends", ended)
    assert state["type"] == "COMPLETED", state
    return [(task["name"].rsplit("-", 1)[0], task["state"]["name"]) for task in server.task_runs(run["id"])]


def test_a_worker_runs_the_shipped_deployment_and_finds_everything_cached_the_second_time(server: Server) -> None:
    """`prefect deploy` of 3.8.8 exits with 1 and a 422 after it has created the deployment: the API decides."""
    assert server.ask("POST", "/work_pools/", {"name": "ingot", "type": "process"})["name"] == "ingot"
    said = server.command("--no-prompt", "deploy", "--name", "demo", "--prefect-file", "infra/prefect.yaml")
    deployment = server.ask("GET", "/deployments/name/train-to-registry/demo")
    assert deployment["parameters"] == {"recipe_name": "demo"}, said.stdout + said.stderr
    worker = ["-m", "prefect", "worker", "start", "--pool", "ingot", "--type", "process", "--limit", "1"]
    with server.process("worker", *worker) as process:
        first, second = (completed(server, deployment["id"], recipe_name="smoke", only="prepare") for _ in range(2))
    assert first == [("prepare", "Completed")]
    assert second == [("prepare", "Cached")]
    assert not process.is_running()
    (made,) = LocalStore(Path(server.environment["INGOT_STORE"])).artifacts()
    made.verify()
