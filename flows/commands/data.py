"""data status|pull|push|add|import|check|show: DVC behind five words, what a run would do with a corpus, and did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows import prefect_events
from pipelines.core import project
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.data import versioning
from pipelines.data.config import DataConfig


def run(verb: str, *arguments: Any, as_json: bool) -> None:
    """Run one of the verbs on the corpus of this project and print its result."""
    verbs: dict[str, Callable[..., dict[str, Any]]] = {
        "status": versioning.status,
        "pull": versioning.pull,
        "push": versioning.push,
        "add": versioning.add,
        "import": versioning.import_url,
    }
    root = project.find()
    result = verbs[verb](DataConfig(), root, *arguments)
    if verb == "push":
        prefect_events.tell(prefect_events.PUSHED, f"data.{root.name}", {"hash": result["hash"]})
    _show(result, as_json=as_json)


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
    from flows import console
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
