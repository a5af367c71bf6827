"""What Ingot tells Prefect's automations: a promotion, a refusal, a new revision of a corpus.

Events are told where a server is configured, and lost where it does not answer: nothing waits for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows import prefect_server
from pipelines.core import project

PROMOTED = "ingot.model.promoted"
REFUSED = "ingot.gate.refused"
PUSHED = "ingot.data.pushed"
PROJECT = "ingot.project"
"""Label of every event: the name of the project's folder."""


def tell(event: str, resource: str, about: Mapping[str, Any]) -> None:
    """Send an event to the configured server, if there is one.

    Args:
        event: one of the names above.
        resource: what it happened to, as `model.ingot-demo`; `ingot.` stands before it in Prefect.
        about: its payload, JSON values.
    """
    if prefect_server.configured_url() is None:
        return
    from prefect.events import emit_event

    labels = {
        "prefect.resource.id": f"ingot.{resource}",
        "prefect.resource.name": resource.partition(".")[2],
        PROJECT: project.find().name,
    }
    emit_event(event, resource=labels, payload=dict(about))
