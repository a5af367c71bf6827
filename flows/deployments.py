"""What `ingot deploy` keeps on a Prefect server: a work pool, deployments, schedules, automations and limits.

Everything has a name of its own and is brought to the state that was asked for, however often the command runs:
Prefect's API replaces a deployment and a limit of the same name, and an automation is looked up by its own.
`prefect deploy` of 3.8.8 ends with a 422 after the first deployment; this needs none of it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pipelines.core import project
from pipelines.core.errors import ConfigError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.actions import ActionTypes
    from prefect.events.schemas.automations import EventTrigger

ENTRYPOINT = "flows.train_to_registry.train_to_registry"
"""Import path: a worker needs the program installed, and no copy of its source."""
WHOLE = "train"
"""Deployment of the whole graph; the others are named by the stage that they run."""
STAGES = ("prepare", "pretrain", "compress", "evaluate", "promote")
_HEARTBEAT_S = 30
"""The shortest that Prefect allows."""
_SILENT_S = 4 * _HEARTBEAT_S
"""A flow run that was not heard of for longer has been killed."""
_ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "Cancelling")


@dataclass(frozen=True)
class Wanted:
    """What is deployed for one project."""

    root: Path
    """The project's folder, on the machine of the worker."""
    pool: str = "ingot"
    pool_type: str = "process"
    recipe: str | None = None
    """None: the project's own."""
    cron: str | None = None
    every_s: int | None = None
    on_data: bool = False
    """Train when `ingot data push` has sent a new revision."""
    notify: str | None = None
    """URL that is told of failures, refusals and promotions by a POST of JSON."""
    limit: tuple[str, int] | None = None
    """Name and slots of the global concurrency limit that the stages of its runs wait for."""

    @property
    def prefix(self) -> str:
        """What the names of deployments and automations begin with: those of several projects stand side by side."""
        return self.root.name


def names(wanted: Wanted) -> dict[str, dict[str, Any]]:
    """Return the deployments, name -> parameters of the flow."""
    recipe: dict[str, Any] = {} if wanted.recipe is None else {"recipe_name": wanted.recipe}
    if wanted.limit is not None:
        recipe["overrides"] = [f"compute.concurrency_limit={wanted.limit[0]}"]
    whole = {f"{wanted.prefix}-{WHOLE}": dict(recipe)}
    return whole | {f"{wanted.prefix}-{stage}": recipe | {"only": stage} for stage in STAGES}


def described(wanted: Wanted) -> dict[str, str]:
    """Return the deployments with what each does, for people."""
    times = {f"at {wanted.cron}": wanted.cron, f"every {wanted.every_s} s": wanted.every_s}
    due = " and ".join(text for text, given in times.items() if given)
    whole = f"the whole graph{f', {due}' if due else ''}"
    return {name: f"the stage {asked['only']}" if "only" in asked else whole for name, asked in names(wanted).items()}


def deploy(client: SyncPrefectClient, wanted: Wanted) -> list[dict[str, str]]:
    """Bring the server to what is wanted; return what was made or brought up to date, one row a thing.

    Args:
        client: of the server.
        wanted: what to deploy.

    Raises:
        ConfigError: the work pool is there and of another type.
    """
    rows = [_pool(client, wanted)]
    if wanted.limit is not None:
        client.upsert_global_concurrency_limit_by_name(*wanted.limit)
        rows.append(_row("limit", wanted.limit[0], f"{wanted.limit[1]} ranks at once, of all runs that wait for it"))
    made = _deployments(client, wanted)
    rows += [_row("deployment", name, about) for name, about in described(wanted).items()]
    webhook = _webhook(client, wanted)
    for name, trigger, action, about in _automations(wanted, made[f"{wanted.prefix}-{WHOLE}"], webhook):
        rows.append(_automation(client, name, trigger, action, about))
    return rows


def _row(kind: str, name: str, about: str) -> dict[str, str]:
    return {"kind": kind, "name": name, "about": about}


def _pool(client: SyncPrefectClient, wanted: Wanted) -> dict[str, str]:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    try:
        there = client.read_work_pool(wanted.pool)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=wanted.pool, type=wanted.pool_type))
    else:
        if there.type != wanted.pool_type:
            raise ConfigError(
                f"the work pool {wanted.pool!r} is there, of type {there.type}, not {wanted.pool_type}",
                hint=f"--pool-type {there.type}, or --pool with a name of its own",
            )
    start = f"prefect worker start --pool {wanted.pool}"
    return _row("work pool", wanted.pool, f"{wanted.pool_type}; `{start}` on the machine that is to work")


def _deployments(client: SyncPrefectClient, wanted: Wanted) -> dict[str, UUID]:
    from prefect.utilities.callables import parameter_schema

    from flows.train_to_registry import FLOW_NAME, train_to_registry

    schema = parameter_schema(train_to_registry.fn).model_dump()
    flow = client.create_flow_from_name(FLOW_NAME)
    environment = {project.VARIABLE: str(wanted.root), "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(_HEARTBEAT_S)}
    made: dict[str, UUID] = {}
    for name, parameters in names(wanted).items():
        only = parameters.get("only")
        what = f"The stage {only} alone" if only else "The whole graph"
        due = schedules(wanted) if only is None else []
        made[name] = client.create_deployment(
            flow,
            name,
            description=f"{what}, for the project {wanted.root}.",
            entrypoint=ENTRYPOINT,
            parameters=parameters,
            parameter_openapi_schema=schema,
            enforce_parameter_schema=True,
            schedules=due,
            work_pool_name=wanted.pool,
            job_variables={"env": environment} if wanted.pool_type == "process" else {},
            tags=["ingot", wanted.prefix],
            concurrency_limit=1,
        )
    return made


def schedules(wanted: Wanted) -> list[Any]:
    """Return when the whole graph is to run, as Prefect has it.

    Raises:
        ConfigError: `cron` is no schedule.
    """
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

    found: list[CronSchedule | IntervalSchedule] = []
    if wanted.cron is not None:
        try:
            found.append(CronSchedule(cron=wanted.cron, timezone="UTC"))
        except ValueError:
            raise ConfigError(
                f"--cron {wanted.cron!r} is no schedule", hint="five fields, as '0 2 * * *' for two at night (UTC)"
            ) from None
    if wanted.every_s is not None:
        found.append(IntervalSchedule(interval=dt.timedelta(seconds=wanted.every_s)))
    return [DeploymentScheduleCreate(schedule=schedule, active=True) for schedule in found]


def _webhook(client: SyncPrefectClient, wanted: Wanted) -> UUID | None:
    """Return the id of the block that holds the address to notify, None for none."""
    if wanted.notify is None:
        return None
    from prefect.blocks.webhook import Webhook
    from pydantic import SecretStr

    block = Webhook(method="POST", url=SecretStr(wanted.notify), allow_private_urls=True)
    return block.save(f"{wanted.prefix}-notify".lower().replace("_", "-"), overwrite=True, client=client)


def _automations(
    wanted: Wanted, whole: UUID, webhook: UUID | None
) -> Iterator[tuple[str, EventTrigger, ActionTypes, str]]:
    """Yield (name, trigger, action, what it is for)."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import CallWebhook, ChangeFlowRunState, RunDeployment
    from prefect.events.schemas.automations import EventTrigger, Posture

    from flows import prefect_events
    from flows.train_to_registry import FLOW_NAME

    of_the_flow = {"prefect.resource.role": "flow", "prefect.resource.name": FLOW_NAME}
    of_the_project = {prefect_events.PROJECT: wanted.prefix}
    beat = "prefect.flow-run.heartbeat"
    silent = EventTrigger(
        after={beat},
        expect={beat, *(f"prefect.flow-run.{end}" for end in _ENDS)},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=of_the_flow,
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=dt.timedelta(seconds=_SILENT_S),
    )
    crashed = ChangeFlowRunState(
        state=StateType.CRASHED, message=f"not heard of for {_SILENT_S} s: killed, or its machine is gone"
    )
    yield "ingot-silent-runs", silent, crashed, f"a run not heard of for {_SILENT_S} s is marked as crashed"
    if wanted.on_data:
        pushed = EventTrigger(
            expect={prefect_events.PUSHED},
            match=of_the_project,
            posture=Posture.Reactive,
            threshold=1,
        )
        yield f"{wanted.prefix}-on-data", pushed, RunDeployment(deployment_id=whole), "`ingot data push` starts a run"
    if webhook is not None:
        for name, events, match, related in (
            ("notify-failed", ("prefect.flow-run.Failed", "prefect.flow-run.Crashed"), {}, of_the_flow),
            ("notify-refused", (prefect_events.REFUSED,), of_the_project, {}),
            ("notify-promoted", (prefect_events.PROMOTED,), of_the_project, {}),
        ):
            trigger = EventTrigger(
                expect=set(events), match=match, match_related=related, posture=Posture.Reactive, threshold=1
            )
            payload = '{"event": "{{ event.event }}", "resource": "{{ event.resource.name }}", "id": "{{ event.id }}"}'
            action = CallWebhook(block_document_id=webhook, payload=payload)
            yield f"{wanted.prefix}-{name}", trigger, action, "the address of --notify is told"


def _automation(
    client: SyncPrefectClient, name: str, trigger: EventTrigger, action: ActionTypes, about: str
) -> dict[str, str]:
    from prefect.events.schemas.automations import AutomationCore

    core = AutomationCore(name=name, description=about, trigger=trigger, actions=[action], tags=["ingot"])
    there = client.read_automations_by_name(name)
    if there:
        client.update_automation(there[0].id, core)
    else:
        client.create_automation(core)
    return _row("automation", name, about)
