"""verify, gc, export, rollback: the verbs that keep the store and the registry."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from flows import console
from flows.commands.lookup import find, find_artifact, store
from flows.run_record import RunRecord, Runs
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, IntegrityError, TransientError
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
    """Remove what neither the newest runs nor a registered model needs, and scratch of finished stages."""
    wanted = _wanted(keep)
    rows = [
        {"node": a.manifest.node, "bytes": a.size, "size": console.size(a.size), "path": str(a.path)}
        for a in store().artifacts()
        if a.manifest.fingerprint not in wanted
    ]
    for row in [] if dry_run else rows:
        shutil.rmtree(str(row["path"]))
    console.table(rows, ["node", "size", "path"], as_json=as_json)
    if not as_json:
        freed = console.size(sum(int(str(row["bytes"])) for row in rows))
        print(f"{len(rows)} artifacts, {freed}: {'would go' if dry_run else 'removed'}.")


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
    from pipelines import tracking
    from pipelines.tracking.config import TrackingConfig

    runs = Runs(store().root).all()
    config = TrackingConfig(**runs[-1].config["tracking"]) if runs else TrackingConfig()
    results = tracking.sync(config, store().root)
    rows = [{"run": r.run_id, "state": "sent" if r.synced else "pending", "message": r.message} for r in results]
    console.table(rows, ["run", "state", "message"], as_json=as_json)
    if any(not r.synced for r in results):
        raise TransientError("MLflow still lacks a part of these runs", hint="start it, then `ingot sync` again")


def _artifacts_of(run: RunRecord) -> list[Artifact]:
    found = [store().find(node.stage, node.fingerprint) for node in run.nodes.values()]
    return [each for each in found if each is not None]


def _wanted(keep: int) -> set[str]:
    """Return the fingerprints that the newest runs and all registered models descend from."""
    newest = Runs(store().root).all()[-keep:] if keep else []
    wanted = {node.fingerprint for run in newest for node in run.nodes.values()}
    wanted |= history.fingerprints(store().root)
    known = {a.manifest.fingerprint: a for a in store().artifacts()}
    pending = list(wanted)
    while pending:
        used = known.get(pending.pop())
        inputs: dict[str, Any] = used.manifest.identity.get("inputs", {}) if used else {}
        for key in set(inputs.values()) - wanted:
            wanted.add(key)
            pending.append(key)
    return wanted


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
