"""What `ingot gc` and `ingot delete` leave in place: what runs at work, the newest runs and registered models need."""

from __future__ import annotations

from collections.abc import Iterator

from flows.run_record import RunRecord, Runs
from pipelines.core import garbage
from pipelines.core.artifact import Artifact
from pipelines.core.garbage import Garbage
from pipelines.core.store import Store
from pipelines.registry import history


def removable(store: Store, keep: int) -> list[Garbage]:
    """Return what neither a run at work, nor the newest runs, nor a registered model needs.

    The newest runs are two lists: those that came to their end, and those that `ingot resume` goes on with. A run that
    left nothing in the store counts in neither, so a row of failures pushes out no good run.

    Args:
        store: where to look.
        keep: how many of each list stay.
    """
    runs = Runs(store.root)
    counted = [run for run in runs.all() if run.ended and _left_something(run, store)]
    unfinished = [run for run in runs.unfinished() if _left_something(run, store)]
    at_work = [run for run in runs.all() if run.at_work]
    going_on = [*at_work, *_newest(unfinished, keep)]
    wanted = {node.fingerprint for run in [*going_on, *_newest(counted, keep)] for node in run.nodes.values()}
    resumable = {node.resume_key for run in going_on for node in run.nodes.values()}
    registered = history.fingerprints(store.root)
    judged = list(_judgement(registered, store))
    decisions = {a.manifest.fingerprint for a in judged if a.manifest.stage == "promote"}
    evaluations = {a.manifest.fingerprint for a in judged} - decisions
    return garbage.find(store, wanted | registered | evaluations, resumable, alone=decisions)


def titles_on_record_in(run: RunRecord, runs: list[RunRecord], store: Store) -> list[str]:
    """Return the registered models whose champion was made by this run and is on record in no other."""
    return [
        f"{name}/{champion['version']}"
        for name in history.models(store.root)
        if (champion := history.champion(store.root, name)) is not None
        and [each.id for each in runs if _made(each, champion.get("fingerprint"))] == [run.id]
    ]


def _newest(runs: list[RunRecord], count: int) -> list[RunRecord]:
    return runs[-count:] if count else []


def _left_something(run: RunRecord, store: Store) -> bool:
    """Tell whether a run has work of its own in the store: a result, or a checkpoint to go on from."""
    return any(
        (node.state == "done" and store.find(node.stage, node.fingerprint) is not None)
        or store.has_scratch(node.stage, node.resume_key)
        for node in run.nodes.values()
    )


def _made(run: RunRecord, fingerprint: str | None) -> bool:
    return any(node.fingerprint == fingerprint and node.state in {"done", "cached"} for node in run.nodes.values())


def _judgement(registered: set[str], store: Store) -> Iterator[Artifact]:
    """Yield the evaluations of registered models, and the decisions that promoted them."""
    for stored in store.artifacts():
        inputs = stored.manifest.identity.get("inputs", {})
        if stored.manifest.stage == "evaluate" and inputs.get("model") in registered:
            yield stored
        if stored.manifest.stage == "promote":
            candidate = stored.manifest.summary.get("candidate")
            if inputs.get(f"model:{candidate}") in registered:
                yield stored
