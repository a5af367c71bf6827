"""The Prefect server of a run: the one that the user configured, or none. Imports no Prefect.

With none, Prefect's engine drives the flow all the same (see `prefect_client.py`): nobody could look at the pages of a
server that lives as long as the run, and starting one took several times longer than everything else at the start.
"""

from __future__ import annotations

import os
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

from pipelines.core.errors import TransientError

_WAIT_S = 5.0
_POLL_S = 0.1
_SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    # The terminal has our own lines; Prefect's pages have both.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    "DO_NOT_TRACK": "1",
}
_ALONE = {
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # nobody reads its log lines; errors reach the user as our own messages
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
}


def prepare(store_root: Path) -> str | None:
    """Set Prefect's environment for a run; must be called before prefect is imported.

    Args:
        store_root: root of the store; without a server Prefect keeps what little it writes there.

    Returns:
        The URL of the server that the user configured, None for none.

    Raises:
        TransientError: the configured server does not answer.
    """
    url = configured_url()
    for key, value in (_SETTINGS if url else _SETTINGS | _ALONE).items():
        os.environ.setdefault(key, value)
    if url:
        _wait(url)
    else:
        os.environ.setdefault("PREFECT_HOME", str(store_root / "prefect"))
    return url


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


def _wait(url: str) -> None:
    """Return when the API answers."""
    until = time.monotonic() + _WAIT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=2) as answer:
                answer.read()
            return
        except urllib.error.HTTPError:
            return  # it answers; whether it lets us in, its client will say
        except OSError as error:
            if time.monotonic() > until:
                raise TransientError(
                    f"the Prefect API at {url} does not answer: {error}",
                    hint="start it, or unset PREFECT_API_URL (`prefect config unset PREFECT_API_URL`) to run without",
                ) from None
        time.sleep(_POLL_S)
