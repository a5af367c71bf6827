"""What every verb of the `ingot` command can do: options that all take, and completion by the shell."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.models import ParameterInfo

from flows import console, logs

Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe", "-r", help="Name of a recipe, path of a TOML file, or a run; default: the recipe of ingot.toml."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

COMPLETIONS = {
    "recipe": "recipes",
    "overrides": "settings",
    "only": "stages",
    "since": "stages",
    "force": "stages",
    "run_id": "runs",
    "target": "targets",
    "candidate": "targets",
    "old": "targets",
    "new": "targets",
    "model": "models",
    "what": "lists",
}
"""Name of a verb's parameter -> function of `complete.py` that lists its values for the shell."""

EVERYWHERE = {
    "verbose": Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Show what libraries say, debug lines, tracebacks, and where the log is."),
    ],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Print results only.")],
}


def with_common_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb that also takes the options that all verbs take, and whose values the shell completes."""
    own = inspect.signature(verb, eval_str=True)
    for name, parameter in own.parameters.items():
        if name in COMPLETIONS:
            info = next(each for each in parameter.annotation.__metadata__ if isinstance(each, ParameterInfo))
            info.autocompletion = _completed(COMPLETIONS[name])
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in EVERYWHERE.items()
    ]

    @functools.wraps(verb)
    def call(*, verbose: bool, quiet: bool, **values: Any) -> None:
        console.set_quiet(quiet)
        if verbose:
            logs.be_verbose()
        verb(**values)

    call.__signature__ = own.replace(parameters=[*own.parameters.values(), *common])  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in call.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return call


def _completed(kind: str) -> Callable[[str], list[str]]:
    """Return a completion that imports what it needs when the shell asks."""

    def complete(incomplete: str) -> list[str]:
        from flows.commands import complete as known

        found: list[str] = getattr(known, kind)(incomplete)
        return found

    return complete
