"""A Prefect API for one run: the user's own server when one is configured, else a private one that ends with the run.

Prefect would start such a server by itself, but one that outlives a killed run; ours is told by the kernel when its
parent dies. Its database stays in the store, so past runs can be looked at later.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pipelines.core import parent_guard, program
from pipelines.core.errors import TransientError

_START_DEADLINE_S = 120.0
_POLL_S = 0.1
_SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    "DO_NOT_TRACK": "1",
}

# With nobody to read its pages during the run, log lines go to the terminal alone; errors reach it as our own messages.
_PRIVATE = {"PREFECT_LOGGING_LEVEL": "CRITICAL", "PREFECT_LOGGING_TO_API_ENABLED": "false"}
_SERVER = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}


@contextlib.contextmanager
def api(store_root: Path) -> Iterator[str]:
    """Give the block a Prefect API, with `PREFECT_API_URL` set; must be entered before prefect is imported.

    Args:
        store_root: root of the store; the private server's database and log live in its `prefect/`.

    Raises:
        TransientError: the configured server does not answer, or the private one does not start.
    """
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    if configured := configured_url():
        _wait(configured, 5.0, None, hint="start it, or unset PREFECT_API_URL to run without a server")
        yield configured
        return
    home = store_root / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    for key, value in (_PRIVATE | {"PREFECT_HOME": str(home)}).items():
        os.environ.setdefault(key, value)
    log_path = home / "server.log"
    with log_path.open("ab") as log:
        server = subprocess.Popen(
            _command(port),
            env=os.environ | _SERVER,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        _wait(url, _START_DEADLINE_S, server, hint=f"its log is {log_path}")
        os.environ["PREFECT_API_URL"] = url
        yield url
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        server.terminate()
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def configured_url() -> str | None:
    """Return the URL of the server that the user configured, by environment or by Prefect's active profile."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    profiles = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect")) / "profiles.toml"
    try:
        table = tomllib.loads(profiles.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError):
        return None
    active = os.environ.get("PREFECT_PROFILE", table.get("active", ""))
    return table.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")


def _command(port: int) -> list[str]:
    """Return the command of a private server that the kernel kills with this process."""
    guarded = [sys.executable, "-I", "-S", parent_guard.__file__, "exec", str(os.getpid())]
    uvicorn = program.command("uvicorn", "--factory", "prefect.server.api.server:create_app")
    return [*guarded, *uvicorn, "--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]


def _wait(url: str, deadline_s: float, server: subprocess.Popen[bytes] | None, *, hint: str) -> None:
    """Return when the API answers."""
    until = time.monotonic() + deadline_s
    while True:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=2) as answer:
                answer.read()
            return
        except urllib.error.HTTPError:
            return  # it answers; whether it lets us in, its client will say
        except OSError as error:
            if time.monotonic() > until or (server is not None and server.poll() is not None):
                raise TransientError(f"the Prefect API at {url} does not answer: {error}", hint=hint) from None
        time.sleep(_POLL_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
