"""verify, gc, delete, export, rollback: the verbs that keep the store and the registry."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import console, retention
from flows.commands.lookup import find, find_model, find_registered, registered_name, store
from flows.run_record import RunRecord, Runs
from pipelines.core import environment, garbage, quantity
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, IntegrityError, TransientError
from pipelines.core.garbage import Garbage

_CHECKPOINTS = "checkpoints and unfinished work"
_KINDS = {
    "prepare": "prepared data",
    "pretrain": "models",
    "compress": "models",
    "fetch": "models",
    "evaluate": "evaluations and decisions",
    "promote": "evaluations and decisions",
}
"""Stage -> what its artifacts are called where space is counted."""
_PLACES = {
    _CHECKPOINTS: "scratch",
    "MLflow's copies of registered models, and its plots": "mlartifacts",
    "records and reports of runs": "runs",
    "Prefect's database": "prefect",
}

if TYPE_CHECKING:
    from pipelines.deploy.export import About


def verify(target: str | None, *, as_json: bool) -> None:
    """Hash artifacts again.

    Raises:
        IntegrityError: naming every damaged artifact.
    """
    if target is None:
        chosen, damaged = list(store().artifacts()), [error.message for error in store().damaged()]
    else:
        found = find(target)
        chosen, damaged = _artifacts_of(found) if isinstance(found, RunRecord) else [found], []
    rows = [_verified(each) for each in chosen]
    console.table(rows, ["node", "fingerprint", "state", "path"], as_json=as_json)
    damaged += [str(row["fault"]) for row in rows if row["fault"]]
    if damaged:
        raise IntegrityError("\n".join(damaged), hint="delete the damaged folder and run again to rebuild it")


def _verified(each: Artifact) -> dict[str, Any]:
    try:
        each.verify()
        fault = None
    except IntegrityError as error:
        fault = error.message
    return {
        "node": each.manifest.node,
        "fingerprint": each.manifest.fingerprint[:12],
        "state": "damaged" if fault else "ok",
        "fault": fault,
        "path": each.place,
    }


def gc(keep: int, *, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove what neither a run at work, nor the newest runs, nor a registered model needs; see `flows.retention`.

    Besides artifacts these are checkpoints of runs that nobody will go on with, and folders of attempts that were
    killed. What somebody works on at this moment stays. A person at a terminal is asked first.

    Raises:
        ConfigError: something would go, nobody can be asked, and neither `yes` nor `dry_run` was said.
    """
    wanted = retention.removable(store(), keep) if store().root.exists() else []
    if not as_json:
        _print_space(wanted)
    if wanted and not dry_run and not yes and not _agreed(wanted):
        print("Nothing was removed.")
        return
    removed = wanted
    if wanted and not dry_run:
        with store().registering():
            # Once more, under the lock: a run may have begun while somebody thought it over.
            removed = list(garbage.remove(store(), retention.removable(store(), keep)))
    total = sum(each.bytes for each in removed)
    rows = [
        {"kind": g.kind, "name": g.name, "bytes": g.bytes, "size": quantity.size(g.bytes), "path": str(g.path)}
        for g in removed
    ]
    if as_json:
        said = {"dry_run": dry_run, "bytes": total, "removed": rows, "kinds": _space(wanted)}
        print(json.dumps(said, indent=1))
        return
    if rows:
        console.table(rows, ["kind", "name", "size", "path"], as_json=False)
    print(f"{len(rows)} folders, {quantity.size(total)} ({total} bytes): {'would go' if dry_run else 'removed'}.")


def _agreed(wanted: list[Garbage]) -> bool:
    total = quantity.size(sum(each.bytes for each in wanted))
    if not sys.stdin.isatty():
        raise ConfigError(
            f"{len(wanted)} folders ({total}) would go, and there is no terminal to ask at",
            hint="`ingot gc --yes` removes them, `ingot gc --dry-run` only lists them",
        )
    return input(f"Remove {len(wanted)} folders, {total}? [y/N] ").strip().lower() in {"y", "yes"}


def _space(wanted: list[Garbage]) -> list[dict[str, Any]]:
    """Return what takes space in the store, the biggest first: how much of each kind goes, and how much stays."""
    going: dict[str, int] = dict.fromkeys([*_PLACES, *_KINDS.values()], 0)
    for each in wanted:
        going[_KINDS[each.stage] if each.kind != "scratch" else _CHECKPOINTS] += each.bytes
    present = {name: store().size_of(store().root / folder) for name, folder in _PLACES.items()}
    for stage, name in _KINDS.items():
        present[name] = present.get(name, 0) + store().size_of(store().root / "artifacts" / stage)
    rows = [{"kind": name, "goes": going[name], "stays": max(0, present[name] - going[name])} for name in going]
    return sorted((row for row in rows if row["goes"] or row["stays"]), key=lambda r: -(r["goes"] + r["stays"]))


def _print_space(wanted: list[Garbage]) -> None:
    if rows := _space(wanted):
        shown = [{**row, "goes": quantity.size(row["goes"]), "stays": quantity.size(row["stays"])} for row in rows]
        console.table(shown, ["kind", "goes", "stays"], as_json=False)


def delete(target: str, *, as_json: bool) -> None:
    """Remove the record and the report of a run. Its artifacts stay until `ingot gc` finds that nothing needs them.

    Raises:
        ConfigError: there is no such run, it is at work, or it is the only record of how a champion was made.
    """
    runs = Runs(store().root)
    try:
        run = runs.get(target)
    except IntegrityError:  # of a damaged record nothing is known but its name
        run_id = target
    else:
        run_id = run.id
        if run.at_work:
            raise ConfigError(f"{run.id} is at work ({run.process})", hint="stop it first")
        if titles := retention.titles_on_record_in(run, runs.all(), store()):
            raise ConfigError(
                f"{run.id} is the only record of how {', '.join(titles)} was made, which is champion",
                hint="`ingot rollback`, or a newer champion, frees it",
            )
        if run.tracking_pending:
            console.say(f"MLflow lacks a part of {run.id}, and will not get it: {run.tracking_problem}")
    size = runs.remove(run_id)
    if as_json:
        print(json.dumps({"run": run_id, "bytes": size}))
    else:
        print(f"{run_id}: record and report removed, {quantity.size(size)}. `ingot gc` frees what only it needed.")


def reclaimable(keep: int) -> str:
    """Say in one sentence what `ingot gc` would free at this moment."""
    total = sum(each.bytes for each in retention.removable(store(), keep))
    if total == 0:
        return "`ingot gc` would free nothing at this moment"
    return f"`ingot gc` would free {quantity.size(total)} at this moment"


def export(target: str, destination: str, file_format: str, precision: str | None, *, weights_only: bool) -> None:
    """Write a model, verified, to a new place.

    Raises:
        ConfigError: no such model, no such format, the destination exists, or the format leaves something out.
    """
    from pipelines.deploy import export as deploy

    environment.clear()
    place = Path(destination).expanduser()
    deploy.check(place, file_format, precision)
    with _exported(target) as (source, about):
        said = deploy.write(source, place, file_format, precision, about=about, weights_only=weights_only)
    print(f"{source.manifest.node} -> {destination}; {said}")


@contextlib.contextmanager
def _exported(target: str) -> Iterator[tuple[Artifact, About]]:
    """Give the model that `target` names: a registered one as the registry has it at this moment."""
    from pipelines.deploy.export import About
    from pipelines.registry import checkout, model_card

    if (named := registered_name(target)) is not None:
        with checkout.opened(named, store().root) as registered:
            print(f"{target} is version {registered.version} of {registered.name}")
            licence = model_card.licence_of(registered.card)
            yield registered.model, About(registered.title, registered.card, licence)
        return
    source = find_model(target)
    card = model_card.of_artifact(_origins(source), source.manifest.node)
    yield source, About(f"{source.manifest.node} {source.manifest.fingerprint[:8]}", card, model_card.licence_of(card))


def _origins(model: Artifact) -> dict[str, Artifact]:
    """Return a model and what it was made from, as far as the store has it, named as the promote stage names them."""
    inputs: dict[str, Artifact] = {}
    above: Artifact | None = model
    while above is not None:
        inputs[f"model:{above.manifest.node}"] = above
        keys = above.manifest.identity.get("inputs", {})
        if (prepare := store().find("prepare", keys.get("prepare", ""))) is not None:
            inputs.setdefault("prepare", prepare)
        base = keys.get("model", "")
        above = next((a for stage in ("compress", "pretrain", "fetch") if (a := store().find(stage, base))), None)
    return inputs


def rollback(model: str | None, *, as_json: bool) -> None:
    """Make the previous champion the champion again."""
    from pipelines.registry import registry

    record = registry.rollback(store().root, find_registered(model))
    if as_json:
        print(json.dumps(record, indent=1, default=str))
    else:
        print(f"champion of {record['model']} is v{record['version']} again (was v{record['previous']})")


def sync(*, as_json: bool) -> None:
    """Send MLflow what it missed.

    Raises:
        TransientError: it still cannot be reached.
    """
    from pipelines.tracking.config import TrackingConfig, recorded
    from pipelines.tracking.sync import sync as send_pending

    runs = Runs(store().root).all()
    config = recorded(runs[-1].config["tracking"]) if runs else TrackingConfig()
    results = send_pending(config, store().root)
    rows = [{"run": r.run_id, "state": "sent" if r.synced else "pending", "message": r.message} for r in results]
    if rows or as_json:
        console.table(rows, ["run", "state", "message"], as_json=as_json)
    else:
        print("MLflow lacks nothing of the runs of this store.")
    if any(not r.synced for r in results):
        raise TransientError("MLflow still lacks a part of these runs", hint="start it, then `ingot sync` again")


def _artifacts_of(run: RunRecord) -> list[Artifact]:
    found = [store().find(node.stage, node.fingerprint) for node in run.nodes.values()]
    return [each for each in found if each is not None]
