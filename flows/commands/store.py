"""verify, gc, export, rollback: the verbs that keep the store and the registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flows import console
from flows.commands.lookup import find, find_artifact, store
from flows.run_record import RunRecord, Runs
from pipelines.core import garbage
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, IntegrityError, TransientError
from pipelines.core.garbage import Garbage
from pipelines.registry import history


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
        "path": str(each.path),
    }


def gc(keep: int, *, dry_run: bool, as_json: bool) -> None:
    """Remove what neither a run at work, nor the newest runs, nor a registered model needs.

    Besides artifacts these are checkpoints of runs that nobody will go on with, and folders of attempts that were
    killed. What somebody works on at this moment stays.
    """
    if not store().root.exists():
        removable: list[Garbage] = []
    elif dry_run:
        removable = _garbage(keep)
    else:
        with store().registering():
            removable = list(garbage.remove(store(), _garbage(keep)))
    total = sum(each.bytes for each in removable)
    rows = [
        {"kind": g.kind, "name": g.name, "bytes": g.bytes, "size": console.size(g.bytes), "path": str(g.path)}
        for g in removable
    ]
    if as_json:
        print(json.dumps({"dry_run": dry_run, "bytes": total, "removed": rows}, indent=1))
        return
    console.table(rows, ["kind", "name", "size", "path"], as_json=False)
    print(f"{len(rows)} folders, {console.size(total)} ({total} bytes): {'would go' if dry_run else 'removed'}.")


def reclaimable(keep: int) -> str:
    """Say in one sentence what `ingot gc` would free at this moment."""
    total = sum(each.bytes for each in _garbage(keep))
    if total == 0:
        return "`ingot gc` would free nothing at this moment"
    return f"`ingot gc` would free {console.size(total)} at this moment"


def _garbage(keep: int) -> list[Garbage]:
    runs = Runs(store().root).all()
    newest = runs[-keep:] if keep else []
    needed = [*newest, *(run for run in runs if run.at_work)]
    wanted = {node.fingerprint for run in needed for node in run.nodes.values()}
    resumable = {n.resume_key for run in needed if run.unfinished or run.at_work for n in run.nodes.values()}
    return garbage.find(store(), wanted | history.fingerprints(store().root), resumable)


def export(target: str, destination: str, file_format: str, precision: str | None, *, weights_only: bool) -> None:
    """Write a model, verified, to a new place.

    Raises:
        ConfigError: no such model, no such format, the destination exists, or the format leaves something out.
    """
    from pipelines.deploy import export as deploy

    deploy.check(Path(destination), file_format, precision)
    source = find_artifact(_champion_fingerprint() if target == "champion" else target)
    if source is None or not (source.path / "model").is_dir():
        raise ConfigError(
            f"{target!r} is no model", hint="`ingot list artifacts` shows pretrain and compress artifacts"
        )
    said = deploy.write(source, Path(destination), file_format, precision, weights_only=weights_only)
    print(f"{source.manifest.node} -> {destination}; {said}")


def rollback(model: str | None, *, as_json: bool) -> None:
    """Make the previous champion the champion again."""
    from pipelines.registry import registry

    record = registry.rollback(store().root, model or _only_model())
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
    console.table(rows, ["run", "state", "message"], as_json=as_json)
    if any(not r.synced for r in results):
        raise TransientError("MLflow still lacks a part of these runs", hint="start it, then `ingot sync` again")


def _artifacts_of(run: RunRecord) -> list[Artifact]:
    found = [store().find(node.stage, node.fingerprint) for node in run.nodes.values()]
    return [each for each in found if each is not None]


def _only_model() -> str:
    names = history.models(store().root)
    if len(names) != 1:
        raise ConfigError(f"there are {len(names)} registered models: {', '.join(names)}", hint="name one")
    return names[0]


def _champion_fingerprint() -> str:
    champion = history.champion(store().root, _only_model())
    if champion is None:
        raise ConfigError("there is no champion yet", hint="`ingot run` makes one")
    return str(champion["fingerprint"])
