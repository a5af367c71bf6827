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

from pipelines.core import environment
from pipelines.core.errors import ConfigError, TransientError
from pipelines.core.redaction import redact

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


_FOR_SERVERS = {"http_proxy", "https_proxy", "all_proxy", "ssl_cert_file", "ssl_cert_dir"}


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
        _check_proxies(url)
        _wait(url)
    else:
        os.environ.setdefault("PREFECT_HOME", str(store_root / "prefect"))
    return url


def _check_proxies(url: str) -> None:
    """See that Prefect's client can be made with the proxies and certificates of the environment.

    For a server on this machine they are left out where it cannot; it needs neither.

    Raises:
        ConfigError: they cannot be used, or the address is none.
    """
    import httpx

    try:
        here = environment.is_this_machine(url)
        httpx.Client(base_url=url).close()
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        named = [name for name in os.environ if name.lower() in _FOR_SERVERS]
        if not named:
            raise ConfigError(f"PREFECT_API_URL = {redact(url)!r} is no address: {error}") from None
        if not here:
            said = ", ".join(f"{name}={redact(os.environ[name])}" for name in sorted(named))
            raise ConfigError(
                f"Prefect at {redact(url)} cannot be asked with {said}: {error}",
                hint="correct or unset them, or name the server in NO_PROXY",
            ) from None
        for name in named:
            del os.environ[name]


def configured_url() -> str | None:
    """Return the URL of the server that the user configured, by environment or by Prefect's active profile."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    try:
        profiles = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect") / "profiles.toml"
        table = tomllib.loads(profiles.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
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
                    f"the Prefect API at {redact(url)} does not answer: {error}",
                    hint="start it, or unset PREFECT_API_URL (`prefect config unset PREFECT_API_URL`) to run without",
                ) from None
        time.sleep(_POLL_S)
