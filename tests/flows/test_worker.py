"""The shipped deployment on a real Prefect server, run by a real process worker: first it works, then all is cached."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.core import parent_guard
from pipelines.core.store import Store

CHECKOUT = Path(__file__).resolve().parents[2]
DEADLINE_S = 400.0
"""On a machine that is busy with other work; alone it takes a minute."""
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_CLI_PROMPT": "false",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Server:
    """A Prefect server of the test's own, with its home, database and port.

    Args:
        home: `PREFECT_HOME`.
        environment: what commands that talk to it need.
    """

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = str(probe.getsockname()[1])
        self._url = f"http://127.0.0.1:{self._port}/api"
        self.home = home
        self.environment = environment | QUIET | {"PREFECT_HOME": str(home), "PREFECT_API_URL": self._url}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        uvicorn = ["-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        with self.process("server", *uvicorn, "--host", "127.0.0.1", "--port", self._port, "--log-level", "warning"):
            self.wait("the server answers", lambda: self.ask("GET", "/health"))
            yield

    @contextlib.contextmanager
    def process(self, name: str, *arguments: str) -> Iterator[psutil.Process]:
        """Run python until the block ends; the kernel ends it with this process, whatever happens."""
        guarded = [
            sys.executable,
            "-I",
            "-S",
            parent_guard.__file__,
            "exec",
            str(os.getpid()),
            sys.executable,
            *arguments,
        ]
        with (self.home / f"{name}.log").open("wb") as log:
            started = subprocess.Popen(guarded, cwd=CHECKOUT, env=self.environment, stdout=log, stderr=log)
        try:
            yield psutil.Process(started.pid)
        finally:
            children = psutil.Process(started.pid).children(recursive=True) if started.poll() is None else []
            started.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a worker may wait for what its server still owes it
                started.wait(10)
            for left in (started, *children):
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            started.wait()

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `prefect`."""
        call = [sys.executable, "-m", "prefect", *arguments]
        return subprocess.run(
            call, cwd=CHECKOUT, env=self.environment, capture_output=True, text=True, timeout=DEADLINE_S
        )

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return what the API answers, None where it does not yet."""
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, content, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or b"null")
        except ConnectionError:
            return None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ConnectionError):
                return None
            raise

    def wait(self, what: str, found: Callable[[], Any]) -> Any:
        """Return what `found` returns once it is something."""
        until = time.monotonic() + DEADLINE_S
        while not (result := found()):
            logs = "\n".join(path.read_text()[-2000:] for path in self.home.glob("*.log"))
            assert time.monotonic() < until, f"not yet: {what}\n{logs}"
            time.sleep(0.2)
        return result

    def completed(self, deployment: str, **parameters: Any) -> list[tuple[str, str]]:
        """Have a worker run a deployment to its end; returns (task, state) of the flow run, in order of their start."""
        run = self.ask("POST", f"/deployments/{deployment}/create_flow_run", {"parameters": parameters})

        def ended() -> Any:
            state = self.ask("GET", f"/flow_runs/{run['id']}")["state"]
            return state if state["type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"} else None

        state = self.wait("the flow run ends", ended)
        assert state["type"] == "COMPLETED", state
        tasks = self.ask("POST", "/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
        started = sorted(tasks, key=lambda task: task["start_time"])
        return [(task["name"].rsplit("-", 1)[0], task["state"]["name"]) for task in started]


@pytest.fixture
def server(tmp_path: Path, environment_of: Callable[[Path], dict[str, str]]) -> Iterator[Server]:
    """A server, and an empty store for what runs there."""
    (tmp_path / "home").mkdir()
    made = Server(tmp_path / "home", environment_of(tmp_path / "store") | {"INGOT_CHECKOUT": str(CHECKOUT)})
    with made.running():
        yield made


def test_a_worker_runs_the_shipped_deployment_and_finds_everything_cached_the_second_time(server: Server) -> None:
    """`prefect deploy` of 3.8.8 exits with 1 and a 422 after it has created the deployment: the API decides."""
    assert server.ask("POST", "/work_pools/", {"name": "ingot", "type": "process"})["name"] == "ingot"
    said = server.command("--no-prompt", "deploy", "--name", "demo", "--prefect-file", "infra/prefect.yaml")
    deployment = server.ask("GET", "/deployments/name/train-to-registry/demo")
    assert deployment["parameters"] == {"recipe_name": "demo"}, said.stdout + said.stderr
    worker = ["-m", "prefect", "worker", "start", "--pool", "ingot", "--type", "process", "--limit", "1"]
    with server.process("worker", *worker) as process:
        first, second = (server.completed(deployment["id"], recipe_name="smoke", only="prepare") for _ in range(2))
    assert first == [("prepare", "Completed")]
    assert second == [("prepare", "Cached")]
    assert not process.is_running()
    (made,) = Store(Path(server.environment["INGOT_STORE"])).artifacts()
    made.verify()
