"""data VERB: DVC behind words of its own, what a run would do with a corpus, and what it did."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import console, prefect_events
from pipelines.core import project, quantity
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.core.store import SCHEME
from pipelines.data import recording, versioning

if TYPE_CHECKING:
    from flows.config import RunConfig
    from flows.run_plan import RunPlan


def run(
    verb: str, settings: Sequence[str] | None, recipe: str | None, *arguments: Any, as_json: bool, **options: bool
) -> None:
    """Run one of the verbs on the corpus of this project and print its result."""
    verbs: dict[str, Callable[..., dict[str, Any]]] = {
        "status": versioning.status,
        "pull": versioning.pull,
        "push": versioning.push,
        "add": recording.add,
        "import": recording.import_url,
        "update": recording.update,
    }
    root, config = _configured(settings, recipe)
    result = verbs[verb](config.data, root, *arguments, **options)
    if verb == "push":
        prefect_events.tell(prefect_events.PUSHED, f"data.{root.name}", {"hash": result["hash"]})
    _show(result, as_json=as_json)


def _configured(settings: Sequence[str] | None, recipe: str | None) -> tuple[Path, RunConfig]:
    from flows import recipe as recipes

    root = project.find()
    if wrong := [each for each in settings or () if "=" not in each]:
        raise ConfigError(f"{wrong[0]!r} is no setting", hint="settings are written KEY=VALUE, as data.path=FOLDER")
    name, overrides = recipes.from_here(recipe, settings or (), root)
    return root, recipes.resolve(name, overrides, root)


def push_prepared(settings: Sequence[str] | None, recipe: str | None, *, into_git: bool, as_json: bool) -> None:
    """Send the prepared corpus of a recipe to the DVC remote.

    Raises:
        ConfigError: it was not prepared yet, the store is on S3, or the remote is a folder that git commits.
    """
    from pipelines.data import remote

    plan = _plan_of_local(settings, recipe)
    found = plan.store.find("prepare", plan.graph["prepare"].fingerprint)
    if found is None:
        raise ConfigError("this recipe's corpus is not prepared yet", hint="`ingot run --only prepare` does that")
    versioning.refuse_committed(plan.project, into_git=into_git)
    _show(remote.push_prepared(found, plan.project), as_json=as_json)


def pull_prepared(settings: Sequence[str] | None, recipe: str | None, *, as_json: bool) -> None:
    """Bring the prepared corpus of a recipe from the DVC remote into the store.

    Raises:
        ConfigError: the remote does not have it, or the store is on S3.
    """
    from pipelines.data import remote

    plan = _plan_of_local(settings, recipe)
    node = plan.graph["prepare"]
    found = remote.pull_prepared(plan.store, node.fingerprint, node.resume_key, plan.project)
    _show({"prepared": node.fingerprint, "bytes": found.size, "path": str(found.path)}, as_json=as_json)


def _plan_of_local(settings: Sequence[str] | None, recipe: str | None) -> RunPlan:
    from flows import run_plan

    plan = run_plan.make(recipe, list(settings or ()))
    if plan.store.address.startswith(SCHEME):
        raise ConfigError(
            f"the store is {plan.store.address}: whoever names it has every prepared corpus in it already",
            hint="run there with the same store.path or INGOT_STORE",
        )
    return plan


def log(settings: Sequence[str] | None, recipe: str | None, count: int, *, as_json: bool) -> None:
    """Print the versions of the corpus."""
    from pipelines.data import revisions

    root, config = _configured(settings, recipe)
    rows = revisions.log(config.data, root, count)
    if not as_json:
        for row in rows:
            row["size"] = "" if row["bytes"] is None else quantity.size(row["bytes"])
    columns = ["revision", "date", "hash", "files", "size", "names", "subject"]
    if rows or as_json:
        console.table(rows, columns, as_json=as_json)
    else:
        print(f"git has no version of {config.data.tracked_by} yet: `git add` and `git commit` make one")


def diff(old: str, new: str | None, settings: Sequence[str] | None, recipe: str | None, *, as_json: bool) -> None:
    """Print what two versions of the corpus have in common, and what not."""
    from pipelines.data import revisions

    if new is not None and "=" in new:
        settings, new = [new, *(settings or ())], None
    root, config = _configured(settings, recipe)
    tokenizer = _newest_tokenizer(config, root)
    count = None if tokenizer is None else revisions.counted_with(tokenizer)
    found = revisions.diff(config.data, config.prepare, root, old, new, count)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['old']} {found['hashes'][0]} -> {found['new']} {found['hashes'][1]}")
    print(f"files: {_said(found['files'])}")
    console.table(found["documents"], list(found["documents"][0]), as_json=False)
    if found["sources"]:
        print()
        console.table(found["sources"], list(found["sources"][0]), as_json=False)
    for name, ids in found["samples"].items():
        print(f"{name + ':':<10}{', '.join(ids)}")
    if count is None:
        print("tokens are counted once the corpus was prepared: `ingot run --only prepare`")


def _newest_tokenizer(config: RunConfig, root: Path) -> Path | None:
    """Return the tokenizer of the newest prepared corpus in the store."""
    from pipelines.core.store import open_store

    prepared = [each for each in open_store(config.store.path, root).artifacts() if each.manifest.stage == "prepare"]
    return prepared[-1].path / "tokenizer" if prepared else None


def gc(keep: str, *, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove from the DVC cache what no kept version needs; a person at a terminal is asked first.

    Raises:
        ConfigError: something would go, nobody can be asked, and neither `yes` nor `dry_run` was said.
    """
    from pipelines.data import cache

    root = project.find()
    found = cache.unused(root, keep)
    told = (
        f"{found['objects']} objects and {found['folders']} folders of killed commands, {quantity.size(found['bytes'])}"
    )
    goes = bool(found["objects"] or found["folders"]) and not dry_run
    if goes and not yes:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"{told} would go, and there is no terminal to ask at",
                hint="`ingot data gc --yes` removes them, `ingot data gc --dry-run` only counts them",
            )
        goes = input(f"Remove {told}? [y/N] ").strip().lower() in {"y", "yes"}
    if goes:
        cache.collect(root, keep)
    if as_json:
        print(json.dumps({"removed": goes, **found}))
    else:
        print(f"{told}: {'removed' if goes else 'would go' if dry_run else 'nothing was removed'}.")


def check(arguments: list[str], recipe: str | None, *, as_json: bool) -> None:
    """Print what a run would do with a corpus, from up to 1,000 of its records.

    Args:
        arguments: a path, if one is given, and settings `KEY=VALUE`; without a path, the corpus of the project.
        recipe: name or path; None for the project's own, or the defaults outside of a project.
        as_json: print JSON.

    Raises:
        ConfigError: there is nothing at the path, or there is more than one.
        IntegrityError: a run would refuse the corpus; raised after everything is printed.
    """
    from flows import recipe as recipes
    from pipelines.data import check as checks
    from pipelines.data import reader

    paths, overrides = [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]
    if len(paths) > 1:
        raise ConfigError(f"one path at a time, not {' and '.join(paths)}", hint="settings are written KEY=VALUE")
    root = project.find() if not paths else project.find_any()
    name = recipe or (None if root else "demo")
    name, overrides = recipes.from_here(name, overrides, root)
    config = recipes.resolve(name, overrides, root)
    folder = Path(paths[0]).expanduser().resolve() if paths else (root or Path()) / config.data.path
    if not folder.exists():
        do = (
            "`ingot data pull` brings it" if not paths else "give a file or a folder; `ingot data import` brings others"
        )
        raise ConfigError(f"{folder} does not exist", hint=do)
    within = next((above for above in (folder, *folder.parents) if (above / ".dvc").is_dir()), None)
    found = checks.check(
        folder,
        reader.relative_names(folder, within),
        config.prepare,
        gate_documents=config.promote.min_documents,
    )
    _show({"path": str(folder), **found}, as_json=as_json)
    if found["refused"]:
        last = found["refused"][-1]
        others = [f"{one['what']}\n  -> {one['do']}" for one in found["refused"][:-1]]
        raise IntegrityError("\n".join(["a run would refuse this corpus: ", *others, last["what"]]), hint=last["do"])


def show(target: str, step: int, rank: int | None, ranks: int | None, *, as_json: bool) -> None:
    """Print the documents that a step of a training saw.

    Args:
        target: a run or a trained model.
        step: counted from 1.
        rank: one rank only; None for all.
        ranks: number of ranks; None for that of the run.
        as_json: print JSON.

    Raises:
        ConfigError: it is no training, its prepared data is gone, or it has no such step or rank.
    """
    from flows.commands import lookup
    from flows.run_record import RunRecord
    from pipelines.training import step_data
    from pipelines.training.config import PretrainConfig
    from pipelines.training.rollbacks import Rollback

    found = lookup.find(target)
    trained = lookup.find_artifact(f"{target}/pretrain") if isinstance(found, RunRecord) else found
    if trained.manifest.stage != "pretrain":
        raise ConfigError(f"{target!r} is no training but {trained.manifest.node}", hint="`ingot list runs` shows runs")
    identity = trained.manifest.identity
    prepared = lookup.find_artifact(identity["inputs"]["prepare"])
    config = PretrainConfig.model_validate(identity["config"])
    rollbacks = [Rollback.of(each) for each in trained.read_json("training.json")["rollbacks"]]
    digest, shown = step_data.documents_of(config, prepared.path, step, rollbacks, world=ranks)
    rows = [vars(part) for part in shown if rank in (None, part.rank)]
    if not rows:
        raise ConfigError(f"there is no rank {rank}", hint=f"valid: 0 to {max(part.rank for part in shown)}")
    if as_json:
        print(json.dumps({"step": step, "batch": digest, "documents": rows}, indent=1))
        return
    print(f"step {step} of {trained.manifest.node} {trained.manifest.fingerprint[:8]}, batch {digest}")
    console.table(rows, list(rows[0]), as_json=False)


def _show(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for key, value in result.items():
        if value not in ([], {}, None) and key != "refused":
            print(f"{key.replace('_', ' '):<16}{_said(value)}")


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_said(inner)} {name}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
