"""A real Prefect server in a process of its own, for tests that ask its API."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from pipelines.core import parent_guard

CHECKOUT = Path(__file__).resolve().parents[2]
DEADLINE_S = 400.0
"""On a machine that is busy with other work; alone it takes a minute."""
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_CLI_PROMPT": "false",
}


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
        self._process: psutil.Process | None = None
        self.environment = environment | QUIET | {"PREFECT_HOME": str(home), "PREFECT_API_URL": self._url}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        uvicorn = ["-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        arguments = [*uvicorn, "--host", "127.0.0.1", "--port", self._port, "--log-level", "warning"]
        with self.process("server", *arguments) as self._process:
            self.wait("the server answers", lambda: self.ask("GET", "/health"))
            yield

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @contextlib.contextmanager
    def process(self, name: str, *arguments: str) -> Iterator[psutil.Process]:
        """Run python until the block ends; the kernel ends it with this process, whatever happens."""
        guarded = [*parent_guard.command(), sys.executable, *arguments]
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

    def task_runs(self, flow_run: str) -> list[dict[str, Any]]:
        """Return the task runs of a flow run, in order of their start."""
        tasks: list[dict[str, Any]] = self.ask("POST", "/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}})
        return sorted(tasks, key=lambda task: task["start_time"])
