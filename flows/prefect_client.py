"""The Prefect client of a run: Prefect is told, never asked (DESIGN, rule 4), so its absence changes nothing.

Prefect's engine drives the flow and cannot work without an API that accepts its states. `told` stands between its
client and the network: while the server answers, it decides; while it does not, or where none is configured, the
states are accepted here, and the run goes on.

This is the one place that reaches into Prefect's client for its transport; `pyproject.toml` pins the version.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import prefect
from prefect.context import FlowRunContext, SyncClientContext
from prefect.settings import (
    PREFECT_API_KEY,
    PREFECT_API_TLS_INSECURE_SKIP_VERIFY,
    PREFECT_API_URL,
    temporary_settings,
)

from pipelines.core.redaction import redact

log = logging.getLogger(__name__)

_ASK_AGAIN_S = 5.0
_AWAY = (httpx.ConnectError, httpx.ConnectTimeout)
_GATEWAY = (502, 503, 504)
"""What a proxy says whose server is gone."""


class _Told(httpx.BaseTransport):
    """Hands requests to the server; answers them as it would have, in as far as the engine needs it, while it is away.

    Args:
        server: Prefect's own transport; None where there is no server.
    """

    def __init__(self, server: httpx.BaseTransport | None) -> None:
        self._server = server
        self._ask_at = 0.0
        self._flow_runs: dict[str, dict[str, Any]] = {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Return the server's answer, or one that lets the run go on."""
        if self._server is not None and time.monotonic() >= self._ask_at:
            try:
                answer = self._server.handle_request(request)
                if answer.status_code not in _GATEWAY:
                    return self._remembered(request, answer)
                why = f"HTTP {answer.status_code}"
            except _AWAY as error:
                why = str(error)
            if self._ask_at == 0.0:
                log.warning("Prefect does not answer (%s); the run goes on without it", redact(why))
            self._ask_at = time.monotonic() + _ASK_AGAIN_S
        return self._accept(request)

    def close(self) -> None:
        """Close the transport to the server."""
        if self._server is not None:
            self._server.close()

    def know(self, flow_run: Any) -> None:
        """Remember a flow run that was made before."""
        self._flow_runs[str(flow_run.id)] = flow_run.model_dump(mode="json")

    def _remembered(self, request: httpx.Request, answer: httpx.Response) -> httpx.Response:
        if request.method == "POST" and request.url.path.endswith("/flow_runs/") and answer.status_code < 300:
            answer.read()
            flow_run = answer.json()
            self._flow_runs[flow_run["id"]] = flow_run
        return answer

    def _accept(self, request: httpx.Request) -> httpx.Response:
        """Answer as the server would: what was sent, with an id; states are accepted."""
        path = request.url.path.rstrip("/").split("/")
        body = json.loads(request.content) if request.content else {}
        made = {"id": str(uuid.uuid4()), "created": _now(), "updated": _now()}
        if path[-1] == "version":
            return httpx.Response(200, json=prefect.__version__)
        if path[-1] == "csrf-token":
            return httpx.Response(422, json={"detail": "CSRF protection is disabled."})
        if path[-1] == "set_state":
            state = {**body["state"], "id": made["id"], "timestamp": _now()}
            self._flow_runs.setdefault(path[-2], {})["state"] = state
            details = {"type": "accept_details"}
            return httpx.Response(201, json={"state": state, "status": "ACCEPT", "details": details})
        if request.method == "PATCH":
            self._flow_runs.get(path[-1], {}).update({k: v for k, v in body.items() if k == "name"})
            return httpx.Response(204)
        if request.method == "GET":
            return httpx.Response(200, json=self._flow_runs.get(path[-1], {}))
        answer = {**body, **made}
        if path[-1] == "flow_runs":
            answer.setdefault("name", "run")
            answer["state"] = {**answer["state"], "id": str(uuid.uuid4()), "timestamp": _now()}
            self._flow_runs[answer["id"]] = answer
        return httpx.Response(201, json=answer)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let flows inside the block run without any server."""
    # An address that is never asked, for the constructor; a key, because without one Prefect starts a server. The
    # environment's proxies and certificates are left out: they may be such that the client cannot even be made.
    updates = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_API_TLS_INSECURE_SKIP_VERIFY: True}
    with temporary_settings(updates=updates):
        context = SyncClientContext(httpx_settings={"trust_env": False})
    context._httpx_settings = None  # noqa: SLF001 - what asks for a client asks for one without settings
    _soften(context.client, lambda _server: _Told(None))
    with temporary_settings(updates={PREFECT_API_KEY: "none"}), context:
        yield


def tolerate() -> None:
    """Let the flow at work go on when its server goes away."""
    clients, flows = SyncClientContext.get(), FlowRunContext.get()
    assert clients is not None
    assert flows is not None

    def told(server: httpx.BaseTransport) -> _Told:
        made = server if isinstance(server, _Told) else _Told(server)
        made.know(flows.flow_run)
        return made

    _soften(clients.client, told)


def name_flow_run(name: str) -> None:
    """Give the flow run at work a name."""
    clients, flows = SyncClientContext.get(), FlowRunContext.get()
    assert clients is not None
    assert flows is not None
    clients.client.set_flow_run_name(flows.flow_run.id, name)


def _soften(client: Any, told: Any) -> None:
    http = client._client  # noqa: SLF001 - the one place, see above
    assert isinstance(http, httpx.Client)
    http._transport = told(http._transport)  # noqa: SLF001
    http._mounts = {pattern: mount and told(mount) for pattern, mount in http._mounts.items()}  # noqa: SLF001


def _now() -> str:
    return datetime.now(UTC).isoformat()
