"""Slots of a global concurrency limit of Prefect: runs that share machines wait for one another, stage by stage.

A stage that computes takes as many slots of `compute.concurrency_limit` as it has ranks, for as long as it runs; what
is cached takes none. Slots are a lease: those of a process that was killed are free again within a minute. A server
that goes away in mid-run holds nothing up: the stage runs without a slot, and a warning says so.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from flows import console
from flows.preflight import COMPUTES
from flows.run_plan import RunPlan
from pipelines.core.errors import ConfigError
from pipelines.core.redaction import redact

log = logging.getLogger(__name__)
_LEASE_S = 60.0
"""The shortest that Prefect allows; it is renewed while the stage runs."""


def check(plan: RunPlan) -> None:
    """See that the limit of a run is on the server, and that every stage that is to run can have its slots.

    Raises:
        ConfigError: there is no such limit, or it has too few slots.
    """
    name = plan.config.compute.concurrency_limit
    if name is None:
        return
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    most = max((_slots(plan, step.node) for step in plan.steps if step.runs), default=0)
    try:
        with get_client(sync_client=True) as client:
            limit = client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        raise ConfigError(
            f"compute.concurrency_limit = {name!r}: the Prefect server has no such limit",
            hint=f"`prefect gcl create {name} --limit {max(most, 1)}`, or `ingot deploy --limit {name}=SLOTS`",
        ) from None
    if limit.limit < most:
        raise ConfigError(
            f"compute.concurrency_limit = {name!r} has {limit.limit} slots, and a stage of {most} ranks takes {most}",
            hint=f"`prefect gcl update {name} --limit {most}`, or fewer ranks (world_size)",
        )


@contextlib.contextmanager
def held(plan: RunPlan, node: str) -> Iterator[None]:
    """Hold the slots of a node while the block runs; wait for them first.

    Args:
        plan: the run.
        node: what is about to run.
    """
    name, slots = plan.config.compute.concurrency_limit, _slots(plan, node)
    if name is None or slots == 0:
        yield
        return
    import httpx
    from prefect.concurrency._asyncio import ConcurrencySlotAcquisitionError
    from prefect.concurrency.sync import concurrency

    lease = concurrency(name, slots, lease_duration=_LEASE_S, raise_on_lease_renewal_failure=False)
    console.say(f"{node}: waiting for {slots} of the slots of {name!r}")
    try:
        lease.__enter__()
    except ConcurrencySlotAcquisitionError as error:
        why = redact(str(error.__cause__ or error))
        log.warning("no slot of %s for %s: Prefect does not answer (%s); it runs without", name, node, why)
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(httpx.HTTPError):  # of a server that is gone the lease ends by itself
            lease.__exit__(None, None, None)


def _slots(plan: RunPlan, node: str) -> int:
    """Return how many slots a node takes: one for each rank, none where it does not compute."""
    about = plan.graph[node].node
    return about.config.ranks_and_cores[0] if about.stage.name in COMPUTES else 0
