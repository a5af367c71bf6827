"""Shell completion: each function returns the words that begin as typed. Fast: no torch, no MLflow, no Prefect."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flows import recipe
from flows.commands.lookup import store
from flows.run_record import Runs
from pipelines.registry import history
from pipelines.stages import STAGES


def recipes(incomplete: str) -> list[str]:
    """Recipes by name, and TOML files."""
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    return _beginning(incomplete, [*recipe.names(), *(str(path) for path in folder.glob("*.toml"))])


def runs(incomplete: str) -> list[str]:
    """Runs, newest first."""
    return _beginning(incomplete, _runs().ids()[::-1])


def stages(incomplete: str) -> list[str]:
    """Stages, and the nodes of the newest run."""
    return _beginning(incomplete, [*STAGES, *_nodes()])


def models(incomplete: str) -> list[str]:
    """Registered models that this store knows of."""
    return _beginning(incomplete, history.models(store().root))


def targets(incomplete: str) -> list[str]:
    """What `show`, `diff`, `export` and `promote` take: the champion, nodes of the newest run, runs."""
    return _beginning(incomplete, ["champion", *_nodes(), *runs(incomplete), "config", "schema"])


def lists(incomplete: str) -> list[str]:
    """What `ingot list` takes."""
    from flows.commands import list as command

    return _beginning(incomplete, command.names())


def settings(incomplete: str) -> list[str]:
    """Dotted settings, with their equals sign."""
    from flows.config import RunConfig

    return _beginning(incomplete, [f"{key}=" for key in _keys(RunConfig)])


def _keys(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = field.alias or name
        inner = [each for each in _models_in(field.annotation) if each is not model]
        if not inner:
            yield key
        for each in inner:
            yield from (f"{key}.{rest}" for rest in _keys(each))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the settings classes that a field holds, also inside a list or an optional."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def _runs() -> Runs:
    return Runs(store().root)


def _nodes() -> list[str]:
    return [name for run_id in _runs().ids()[-1:] for name in _runs().get(run_id).nodes]


def _beginning(incomplete: str, words: Iterable[str]) -> list[str]:
    return [word for word in dict.fromkeys(words) if word.startswith(incomplete)]
