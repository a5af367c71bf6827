"""`ingot deploy` on a real Prefect server: what it makes, that a second time changes nothing, and what sets it off."""

from __future__ import annotations

import http.server
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import deployments
from tests.flows.prefect_process import CHECKOUT, DEADLINE_S, Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def webhook() -> Iterator[tuple[str, queue.SimpleQueue[dict[str, Any]]]]:
    """An address on this machine, and what was posted to it."""
    told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}/hook", told
        served.shutdown()
        thread.join()


def ingot(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "flows", *arguments]
    return subprocess.run(
        call, cwd=CHECKOUT, env=server.environment, capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )


def test_a_project_is_deployed_and_what_it_waits_for_sets_it_off(
    server: Server, webhook: tuple[str, queue.SimpleQueue[dict[str, Any]]]
) -> None:
    address, told = webhook
    options = [
        "--recipe",
        "smoke",
        "--cron",
        "0 2 * * *",
        "--on-data",
        "--notify",
        address,
        "--limit",
        "gpu=2",
        "--json",
    ]
    rows = json.loads(ingot(server, "deploy", *options).stdout)
    assert json.loads(ingot(server, "deploy", *options).stdout) == rows

    name = CHECKOUT.name
    deployments = {d["name"]: d for d in server.ask("POST", "/deployments/filter", {})}
    stages = {f"{name}-{stage}" for stage in ("prepare", "pretrain", "compress", "evaluate", "promote")}
    assert set(deployments) == {f"{name}-train", *stages}
    whole, alone = deployments[f"{name}-train"], deployments[f"{name}-evaluate"]
    waits = {"overrides": ["compute.concurrency_limit=gpu"]}
    assert whole["parameters"] == {"recipe_name": "smoke"} | waits
    assert alone["parameters"] == {"recipe_name": "smoke", "only": "evaluate"} | waits
    assert [schedule["schedule"]["cron"] for schedule in whole["schedules"]] == ["0 2 * * *"]
    assert alone["schedules"] == []
    assert {"recipe_name", "overrides", "only", "since", "force"} <= set(
        whole["parameter_openapi_schema"]["properties"]
    )
    assert server.ask("GET", "/v2/concurrency_limits/gpu")["limit"] == 2
    automations = {a["name"] for a in server.ask("POST", "/automations/filter", {})}
    mine = ("on-data", "notify-failed", "notify-refused", "notify-promoted")
    assert automations == {"ingot-silent-runs", *(f"{name}-{each}" for each in mine)}

    events = (
        "import sys; from flows import prefect_events as e; "
        "e.tell(e.PUSHED, 'data.x', {'hash': 'h'}); e.tell(e.PROMOTED, 'model.mine', {'version': '1'})"
    )
    environment = server.environment | {"INGOT_PROJECT": str(CHECKOUT)}
    subprocess.run([sys.executable, "-c", events], cwd=CHECKOUT, env=environment, check=True, timeout=DEADLINE_S)
    started = server.wait(
        "a pushed revision starts a run",
        lambda: server.ask("POST", "/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}),
    )
    assert whole["id"] in {run["deployment_id"] for run in started if not run["auto_scheduled"]}
    message = told.get(timeout=DEADLINE_S)
    assert (message["event"], message["resource"]) == ("ingot.model.promoted", "mine")


def test_the_file_for_prefects_own_command_has_the_same_deployments() -> None:
    listed = yaml.safe_load((CHECKOUT / "infra" / "prefect.yaml").read_text())["deployments"]
    assert {each["name"] for each in listed} == {"demo", "nightly", *(f"demo-{stage}" for stage in deployments.STAGES)}
    wanted = deployments.names(deployments.Wanted(Path("demo"), recipe="demo"))
    for each in listed:
        if each["name"].startswith("demo-"):
            assert each["parameters"] == wanted[each["name"]]


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (["--cron", "at night"], "is no schedule"),
        (["--limit", "gpu"], "not NAME=SLOTS"),
        (["--limit", "gpu=0"], "not NAME=SLOTS"),
        (["--recipe", "smok"], "smok"),
        ([], "no Prefect server is configured"),
    ],
)
def test_what_cannot_be_deployed_is_refused_before_a_server_is_asked(
    options: list[str], refusal: str, tmp_path: Path
) -> None:
    said = {"PREFECT_HOME": str(tmp_path), "INGOT_PROJECT": str(CHECKOUT)}
    env = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"} | said
    ended = subprocess.run([sys.executable, "-m", "flows", "deploy", *options], env=env, capture_output=True, text=True)
    assert ended.returncode == 2
    assert refusal in ended.stderr
