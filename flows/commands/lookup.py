"""Find a run or an artifact by what a user types. Every command that takes a model takes it in all of these ways.

    champion                          the champion, where one model is registered
    NAME@champion  models:/NAME@x     what an alias of a registered model names
    NAME/3  models:/NAME/3            a version of a registered model
    NAME                              its champion
    compress.gptq-int4-g64            a node: of the newest run that has its artifact; `gptq-int4-g64` is the same
    RUN                               a run; where a model is wanted: the one that it promoted, or was to promote
    RUN/NODE                          a node of that run
    3f2a91                            the beginning of a fingerprint or a digest
    path/to/folder                    an artifact's folder, or the model folder in it

What matches exactly is preferred to what only begins so.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows import console
from flows.config import StoreConfig
from flows.run_record import RunRecord, Runs
from pipelines.core import artifact, project
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, TransientError
from pipelines.core.settings import is_file
from pipelines.core.store import SCHEME, Store, open_store
from pipelines.registry import current, history
from pipelines.registry.initial_weights import REGISTERED

CHAMPION = "champion"
MODEL_FOLDER = "model"
_MIN_DIGITS = 6
_MODEL_STAGES = ("pretrain", "fetch", "compress")
_SHOWN = 8


def store() -> Store:
    """Return the default store: the project's, or that of $INGOT_STORE, which may lie outside of any project."""
    said = StoreConfig().path
    return open_store(said) if said.startswith(SCHEME) or Path(said).is_absolute() else open_store(said, project.find())


def find(target: str) -> RunRecord | Artifact:
    """Return the run or the artifact that `target` names.

    Raises:
        ConfigError: nothing has that name (the message offers the nearest), or several things begin so (it lists them).
    """
    runs = Runs(store().root).all()[::-1]
    found = _exact(target, runs)
    if found is not None:
        return found
    beginnings: dict[str, RunRecord | Artifact] = {run.id: run for run in runs if run.id.startswith(target)}
    beginnings |= _beginning_so(target)
    if len(beginnings) > 1:
        raise _ambiguous(target, list(beginnings))
    if not beginnings:
        raise _nothing(target, runs)
    return next(iter(beginnings.values()))


def find_artifact(target: str) -> Artifact:
    """Return the artifact that `target` names; of a run, the model that it promoted or was to promote.

    Raises:
        ConfigError: see `find`; or it is a run without such a model.
    """
    found = find(target)
    return found if isinstance(found, Artifact) else _candidate_of(found)


def find_model(target: str) -> Artifact:
    """Return the artifact of the model that `target` names: it has a folder `model/`.

    Raises:
        ConfigError: see `find_artifact`; or what it names is no model.
    """
    found = find_artifact(target)
    if not any(name.startswith(f"{MODEL_FOLDER}/") for name in found.manifest.files):
        raise ConfigError(
            f"{target!r} is no model, it is the artifact of {found.manifest.node}",
            hint="`ingot list artifacts` shows pretrain and compress artifacts",
        )
    return found


def registered_name(target: str) -> str | None:
    """Return `models:/NAME@ALIAS` or `models:/NAME/VERSION` where `target` names a registered version, else None.

    Raises:
        ConfigError: it is `champion`, and there is no registered model, or more than one.
    """
    if target == CHAMPION:
        return f"models:/{_only_registered(_registered_names())}@{CHAMPION}"
    if (parts := _registered_parts(target)) is None or (not target.startswith("models:/") and _folder(target)):
        return f"models:/{target}@{CHAMPION}" if target in history.models(store().root) else None
    known = target.startswith("models:/") or parts["name"] in _registered_names()
    return f"models:/{target.removeprefix('models:/')}" if known else None


def find_registered(target: str | None) -> str:
    """Return the name of a registered model: the only one where `target` is None.

    `NAME/3` and `NAME@alias` must name its champion: they say which title is meant.

    Raises:
        ConfigError: there is no such registered model, or what `target` names is no champion.
    """
    names = _registered_names()
    if target in names:
        return str(target)
    if target in {None, CHAMPION}:
        return _only_registered(names)
    champions = {name: row for name in names for row in _versions(name) if CHAMPION in row["aliases"]}
    if (parts := _registered_parts(str(target))) is not None and parts["name"] in names:
        version = champions.get(parts["name"], {}).get("version")
        holding = [parts["name"]] if parts["alias"] == CHAMPION or parts["version"] == version else []
    else:
        found = find_model(str(target)).manifest.fingerprint
        holding = [name for name, row in champions.items() if row["fingerprint"] == found]
    if len(holding) != 1:
        titles = f"of {', '.join(holding)}" if holding else "of no registered model"
        raise ConfigError(f"{target!r} is champion {titles}", hint=f"registered models: {', '.join(names) or 'none'}")
    return holding[0]


def find_candidate(target: str | None, run: str | None) -> tuple[RunRecord, str | None]:
    """Return the run whose model is to be promoted, and the model's name in its recipe; None for the recipe's choice.

    Args:
        target: a model; None for the choice of the run's recipe.
        run: the run that made it; None for the newest that has it.

    Raises:
        ConfigError: see `find_model`; or no run made it.
    """
    runs = Runs(store().root)
    record = runs.get(run)
    if target is None:
        return record, None
    name = target.removeprefix("compress.")
    if {target, f"compress.{name}"} & record.nodes.keys() and _is_model(record.nodes, name):
        return record, name
    if run is None and (asked := _named_run(target, runs.all())) is not None:
        record, node = asked
        return record, None if node is None else node.removeprefix("compress.")
    wanted = find_model(target)
    for each in [record] if run is not None else runs.all()[::-1]:
        for node, made in each.nodes.items():
            if made.fingerprint == wanted.manifest.fingerprint:
                return each, node.removeprefix("compress.")
    raise ConfigError(
        f"{target!r} was made by {'no run that is on record' if run is None else f'another run than {record.id}'}",
        hint=f"models of {record.id}: {', '.join(_models_of(record))}",
    )


def _exact(target: str, runs: list[RunRecord]) -> RunRecord | Artifact | None:
    """Return what has this very name; `runs` are newest first."""
    for run in runs:
        if run.id == target:
            return run
    if (found := _folder(target)) is not None:
        return found
    if target == CHAMPION:
        return _registered(_only_registered(history.models(store().root)), alias=CHAMPION)
    if (found := _newest(target, runs)) is not None:
        return found
    named = _named_run(target, runs)
    if named is not None and named[1] is not None:
        return _node_of(*named)
    if target in history.models(store().root):
        return _registered(target, alias=CHAMPION)
    if (parts := _registered_parts(target)) is not None:
        return _registered(parts["name"], alias=parts["alias"], version=parts["version"])
    return None


def _folder(target: str) -> Artifact | None:
    """Return the artifact in this folder, or around this model folder."""
    path = Path(target).expanduser()
    if is_file(path / artifact.MANIFEST):
        return artifact.load(path)
    path = path.absolute()
    if path.name == MODEL_FOLDER and (path.parent / artifact.MANIFEST).is_file():
        return artifact.load(path.parent)
    return None


def _newest(node: str, runs: list[RunRecord]) -> Artifact | None:
    """Return the artifact of a node, or of a variant by its name, of the newest run that has it.

    Raises:
        ConfigError: runs have such a node, and the artifact of none is there.
    """
    having = [(run, name) for name in (node, f"compress.{node}") for run in runs if name in run.nodes]
    stored = (store().find(run.nodes[name].stage, run.nodes[name].fingerprint) for run, name in having)
    found = next((each for each in stored if each is not None), None)
    return _node_of(*having[0]) if having and found is None else found


def _named_run(target: str, runs: list[RunRecord]) -> tuple[RunRecord, str | None] | None:
    """Return the run, and the node for `RUN/NODE`; the beginning of a run's id is enough if no other begins so."""
    name, _, node = target.partition("/")
    exact = [run for run in runs if run.id == name]
    found = exact or [run for run in runs if name and run.id.startswith(name)]
    if len(found) > 1 and node:
        raise _ambiguous(name, [run.id for run in found])
    if len(found) != 1:
        return None
    if not node:
        return found[0], None
    return found[0], node if node in found[0].nodes else f"compress.{node}"


def _node_of(run: RunRecord, node: str | None) -> Artifact:
    record = run.nodes.get(node or "")
    if record is None:
        near = difflib.get_close_matches(node or "", list(run.nodes), n=1)
        offer = f"; did you mean {run.id}/{near[0]}?" if near else ""
        raise ConfigError(f"{run.id} has no node {node!r}{offer}", hint=f"its nodes: {', '.join(run.nodes)}")
    stored = store().find(record.stage, record.fingerprint)
    if stored is None:
        raise ConfigError(
            f"the artifact of {run.id}/{node} is not in {store().address}: not made yet, or removed by `ingot gc`",
            hint=f"`ingot run --recipe {run.id}` makes it",
        )
    return stored


def _models_of(run: RunRecord) -> list[str]:
    return [name.removeprefix("compress.") for name, node in run.nodes.items() if node.stage in _MODEL_STAGES]


def _is_model(nodes: Mapping[str, Any], name: str) -> bool:
    return any(node in nodes and nodes[node].stage in _MODEL_STAGES for node in (name, f"compress.{name}"))


def _candidate_of(run: RunRecord) -> Artifact:
    """Return the model that a run promoted, or that its recipe names to be promoted."""
    promote = next((node for node in run.nodes.values() if node.stage == "promote"), None)
    asked = run.config.get("promote", {}).get("candidate")
    name = promote.summary.get("candidate", asked) if promote is not None else asked
    if not _is_model(run.nodes, str(name)):
        raise ConfigError(
            f"{run.id} has promoted no model",
            hint=f"name one: {', '.join(f'{run.id}/{model}' for model in _models_of(run)) or 'it has none'}",
        )
    return _node_of(run, name if name in run.nodes else f"compress.{name}")


def _beginning_so(target: str) -> dict[str, Artifact]:
    """Return the artifacts whose fingerprint or digest is or begins so, by what tells them apart."""
    if len(target) < _MIN_DIGITS:
        return {}
    found = [a for a in store().artifacts() if a.manifest.fingerprint.startswith(target) or a.digest.startswith(target)]
    if len({each.digest for each in found}) == 1:
        found = found[-1:]  # the same bytes made by two configurations
    return {f"{each.manifest.node} {each.manifest.fingerprint[: len(target) + 4]}": each for each in found}


def _registered_names() -> list[str]:
    """Return the registered models that this store knows; of a store that registered none, those of its registry."""
    if names := history.models(store().root):
        return names
    from pipelines.registry import registry

    return sorted({row["name"] for row in registry.list_models(store().root)})


def _only_registered(names: list[str]) -> str:
    if not names:
        raise ConfigError("there is no registered model yet", hint="`ingot run` makes one")
    if len(names) > 1:
        raise ConfigError(
            f"there are {len(names)} registered models",
            hint=f"say which: {', '.join(f'{name}@{CHAMPION}' for name in names)}",
        )
    return names[0]


def _registered_parts(target: str) -> re.Match[str] | None:
    """Return name and alias or version of `NAME@ALIAS` and `NAME/VERSION`, with or without `models:/` before it."""
    return REGISTERED.fullmatch(f"models:/{target.removeprefix('models:/')}")


def _registered(name: str, *, alias: str | None = None, version: str | None = None) -> Artifact:
    """Return the artifact of a version of a registered model.

    Raises:
        ConfigError: there is no such model, version or alias, or its artifact is not in this store.
    """
    versions = _versions(name)
    row = next((row for row in versions if version == row["version"] or alias in row["aliases"]), None)
    if row is None:
        wanted = f"version {version}" if version else f"alias {alias!r}"
        fault = f"{name} has no {wanted}" if versions else f"there is no registered model {name!r}"
        near = difflib.get_close_matches(name, history.models(store().root), n=1)
        offer = f"; did you mean {near[0]}@{CHAMPION}?" if near and not versions else ""
        raise ConfigError(fault + offer, hint="`ingot list models` shows names, versions and aliases")
    stored = next((a for stage in _MODEL_STAGES if (a := store().find(stage, row["fingerprint"]))), None)
    if stored is None or row["digest"] not in {None, stored.digest}:
        raise ConfigError(
            f"{name}/{row['version']} is registered, but the artifact {row['fingerprint'][:12] or '(of others)'} that "
            f"it was made of is not in {store().address}",
            hint=f"its files: {row['path'] or 'see `ingot list models`'}",
        )
    return stored


def _versions(name: str) -> list[dict[str, Any]]:
    """Return what is known of the versions of a registered model: MLflow's word, else this store's own history."""
    from pipelines.registry import registry

    try:
        rows = registry.list_models(store().root, current.where(store().root, name))
    except TransientError as error:
        console.say(f"{error.message}; what {name} holds is taken from the history of this store")
        rows = []
    versions = [
        row | {"fingerprint": row["tags"].get("fingerprint", ""), "digest": row["tags"].get("digest")}
        for row in rows
        if row["name"] == name
    ]
    return versions or _remembered_versions(name)


def _remembered_versions(name: str) -> list[dict[str, Any]]:
    champion = history.champion(store().root, name)
    holder = champion["version"] if champion is not None else None
    return [
        {
            "version": record["version"],
            "aliases": [CHAMPION] if record["version"] == holder else [],
            "fingerprint": record["fingerprint"],
            "digest": record.get("digest"),
            "path": None,
        }
        for record in history.read(store().root, name)[::-1]
        if record["action"] != history.REFUSED and record.get("fingerprint")
    ]


def _ambiguous(beginning: str, names: list[str]) -> ConfigError:
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return ConfigError(
        f"{beginning!r} is the beginning of {len(names)} names: {shown}", hint="type more of the one that is meant"
    )


def _nothing(target: str, runs: list[RunRecord]) -> ConfigError:
    names = {run.id for run in runs} | {name for run in runs for name in run.nodes}
    names |= {name.removeprefix("compress.") for run in runs for name in run.nodes}
    names |= {f"{name}@{CHAMPION}" for name in history.models(store().root)} | {CHAMPION}
    near = difflib.get_close_matches(target, sorted(names), n=1)
    if Path(target).is_dir():
        return ConfigError(
            f"the folder {target} holds no artifact: it has no {artifact.MANIFEST}",
            hint="artifacts lie in artifacts/<stage>/ of the store; `ingot list artifacts` shows them",
        )
    return ConfigError(
        f"nothing here is called {target!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
        hint="`ingot list runs`, `ingot list artifacts` and `ingot list models` show what there is",
    )
