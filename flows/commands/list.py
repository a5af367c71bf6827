"""list: models, champions, runs, artifacts (newest first), recipes, and what a recipe can name."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterable
from typing import Any, get_args

from flows import console, recipe
from flows.commands.lookup import store
from flows.run_record import Runs
from pipelines.core import program, project, quantity
from pipelines.core.errors import ConfigError
from pipelines.stages import STAGES

Rows = list[dict[str, Any]]


def show(what: str, *, as_json: bool) -> None:
    """Print one of the lists.

    Raises:
        ConfigError: there is no such list.
    """
    if what not in _LISTS:
        near = difflib.get_close_matches(what, _LISTS, n=1)
        raise ConfigError(
            f"there is no list of {what!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            hint=", ".join(_LISTS),
        )
    rows, columns = _LISTS[what]
    console.table(rows(), columns, as_json=as_json)


def names() -> list[str]:
    """Return the lists that there are."""
    return list(_LISTS)


def _models() -> Rows:
    from pipelines.registry import registry

    return registry.list_models(store().root)


def _champions() -> Rows:
    """Return the history, newest first, under the champions of this moment that others made since."""
    from pipelines.registry import current, history

    root = store().root
    rows = history.read(root)[::-1]
    for model in history.models(root):
        champion, known = current.champion(current.where(root, model), root, model), history.champion(root, model)
        if champion is None and known is not None:
            rows.insert(0, {"model": model, "action": history.OBSERVED, "version": None, "why": "the alias names none"})
        elif champion is not None and champion != known:
            rows.insert(0, champion)
    return rows


def _runs() -> Rows:
    return [
        {
            "id": run.id,
            "recipe": run.recipe,
            "status": run.state,
            "result": run.result,
            "seconds": run.seconds,
            "took": quantity.duration(run.seconds),
            "started_at": run.started_at,
            "finished_at": run.finished_at,
            "overrides": run.overrides,
            "data_hash": run.data_hash,
        }
        for run in Runs(store().root).all()[::-1]
    ]


def _artifacts() -> Rows:
    return [
        {
            "fingerprint": a.manifest.fingerprint[:12],
            "stage": a.manifest.stage,
            "node": a.manifest.node,
            "size": quantity.size(a.size),
            "bytes": a.size,
            "created_at": a.manifest.provenance.created_at if a.manifest.provenance else None,
            "digest": a.digest,
            "path": a.place,
            "summary": a.manifest.summary,
        }
        for a in reversed(list(store().artifacts()))
    ]


def _recipes() -> Rows:
    here = project.find_any()
    return [{"name": name, "description": recipe.description(name, here)} for name in recipe.names(here)]


def _compressors() -> Rows:
    from models.compression import registry

    return [registry.describe(name) for name in registry.names()]


def _optimizers() -> Rows:
    """Name each optimizer with the first line of its module, read without importing it (and torch with it)."""
    from pipelines.training.optimizer_config import OptimizerConfig

    return _modules("models.optim", get_args(OptimizerConfig.model_fields["name"].annotation))


def _stages() -> Rows:
    return [
        {"name": name, "version": stage.version, "description": _first_line(stage.entry.partition(":")[0])}
        for name, stage in STAGES.items()
    ]


def _objectives() -> Rows:
    from models.objectives import registry

    return _modules("models.objectives", registry.names())


def _monitors() -> Rows:
    from pipelines.training.monitors import registry

    return _modules("pipelines.training.monitors", registry.names())


def _probes() -> Rows:
    from pipelines.evaluation import probe

    return _modules("pipelines.evaluation.probes", probe.names())


def _executors() -> Rows:
    from flows import executors

    return _modules("flows.executors", executors.names())


def _modules(package: str, names: Iterable[str]) -> Rows:
    return [{"name": name, "description": _first_line(f"{package}.{name}")} for name in names]


def _first_line(module: str) -> str:
    """Return the first line of a module's description, read without importing it."""
    source = program.ROOT.joinpath(*module.split(".")).with_suffix(".py")
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


_LISTS: dict[str, tuple[Callable[[], Rows], list[str]]] = {
    "models": (_models, ["name", "version", "aliases", "path", "metrics"]),
    "champions": (_champions, ["time", "model", "action", "version", "who", "why"]),
    "runs": (_runs, ["id", "status", "result", "took", "recipe", "overrides"]),
    "artifacts": (_artifacts, ["fingerprint", "node", "size", "created_at", "path"]),
    "recipes": (_recipes, ["name", "description"]),
    "compressors": (_compressors, ["name", "kind", "bits", "calibration", "paper"]),
    "optimizers": (_optimizers, ["name", "description"]),
    "objectives": (_objectives, ["name", "description"]),
    "monitors": (_monitors, ["name", "description"]),
    "probes": (_probes, ["name", "description"]),
    "stages": (_stages, ["name", "version", "description"]),
    "executors": (_executors, ["name", "description"]),
}
