"""data status|pull|push|add|import|check: DVC behind five words, and what a run would do with a corpus."""

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
