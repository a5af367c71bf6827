"""deploy: what a Prefect server needs to run this project on a schedule, on an event, or from its page."""

from __future__ import annotations

from flows import console, deployments, prefect_server
from flows.deployments import Wanted
from flows.recipe import resolve
from pipelines.core import project
from pipelines.core.errors import ConfigError


def wanted(
    recipe: str | None,
    pool: str,
    pool_type: str,
    cron: str | None,
    every_s: int | None,
    notify: str | None,
    limit: str | None,
    *,
    on_data: bool,
) -> Wanted:
    """Return what the command line asks for; see `Wanted`.

    Raises:
        ConfigError: a limit is not NAME=SLOTS, or the recipe does not resolve.
    """
    slots = None
    if limit is not None:
        name, _, number = limit.partition("=")
        if not name or not number.isdigit() or int(number) < 1:
            raise ConfigError(f"--limit {limit!r}: not NAME=SLOTS", hint="as --limit gpu=2")
        slots = (name, int(number))
    root = project.find()
    overrides = [] if slots is None else [f"compute.concurrency_limit={slots[0]}"]
    resolve(recipe or project.settings(root).recipe, overrides, project=root)  # what would fail at night is refused now
    return Wanted(root, pool, pool_type, recipe, cron, every_s, on_data, notify, slots)


def run(wanted: Wanted, *, dry: bool, as_json: bool) -> None:
    """Create or update everything that is wanted on the configured server, and say what there is.

    Args:
        wanted: what to deploy.
        dry: only say which deployments there would be.
        as_json: print JSON.

    Raises:
        ConfigError: no server is configured, or the work pool is of another type.
        TransientError: it does not answer.
    """
    deployments.schedules(wanted)  # refuses what is none
    if dry:
        listed = deployments.described(wanted).items()
        rows = [{"kind": "deployment", "name": name, "about": about} for name, about in listed]
    else:
        if prefect_server.configured_url() is None:
            raise ConfigError(
                "no Prefect server is configured, so there is nothing to deploy to",
                hint="`prefect server start`, then `prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api`",
            )
        prefect_server.prepare(wanted.root)
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            rows = deployments.deploy(client, wanted)
    console.table(rows, ["kind", "name", "about"], as_json=as_json)
