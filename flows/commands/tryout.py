"""try: what models make of prompts. torch is imported when everything that can be refused has been."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from flows.commands.lookup import find, find_model, store
from flows.run_record import RunRecord, Runs
from models.architectures.config import Family
from pipelines.core import environment, progress_bars
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig, resolve_device
from pipelines.core.errors import ConfigError
from pipelines.core.stage import BASES
from pipelines.measure import answers
from pipelines.measure.answers import Question
from pipelines.measure.config import SamplingSettings
from pipelines.modelio import folder

_ENCODER_ONLY = frozenset({"neighbours", "count"})
_GUESSES = 5
"""Words for a mask, or neighbours, where nobody says how many."""


def run(
    targets: Sequence[str],
    prompts: Sequence[str],
    options: Mapping[str, Any],
    *,
    neighbours: bool,
    count: int | None,
    as_json: bool,
) -> None:
    """Print what models make of prompts, prompt by prompt, all models side by side.

    Args:
        targets: what names a model, or a run with all its models; empty: the newest run that has any.
        prompts: texts; empty: the lines of standard input, or, where that is a terminal, first words of held-out
            documents.
        options: how a decoder's tokens are drawn: `max_new_tokens` and the fields of `SamplingSettings`; None where
            nobody said.
        neighbours: find held-out sentences near the prompts instead of filling in words; for encoders.
        count: words for each mask, or neighbours; for encoders.
        as_json: print JSON.

    Raises:
        ConfigError: no such model, models of two families, or an option that does nothing for them.
        IntegrityError: a model is damaged, or its corpus is gone.
    """
    environment.clear()
    models = _models(targets) if targets else _newest()
    family = _family(models)
    given = {name: value for name, value in options.items() if value is not None}
    _refuse_idle(family, [*given, *(["neighbours"] if neighbours else []), *(["count"] if count else [])])
    new_tokens, sampling = given.pop("max_new_tokens", None), _sampling(given)
    with progress_bars.quiet():
        texts = list(prompts) or _piped() or _first_words(next(iter(models.values())), family)
        question = Question(tuple(texts), sampling, new_tokens, count or _GUESSES)
        rows = _answers(models, question, neighbours=neighbours)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        _print(rows)


def _answers(models: Mapping[str, Artifact], question: Question, *, neighbours: bool) -> list[dict[str, Any]]:
    """Return a row for each prompt and model: one model after the other is loaded, prompts lie together."""
    from pipelines.evaluation import tryout

    device, said = resolve_device(ComputeConfig().device), {}
    for name, model in models.items():
        store().verify(model)
        prepared = _corpus(model).path if neighbours else None
        said[name] = tryout.ask(model.path / "model", device, dataclasses.replace(question, prepared=prepared))
    return [
        {"prompt": prompt, "model": name} | found[number]
        for number, prompt in enumerate(question.prompts)
        for name, found in said.items()
    ]


def _first_words(model: Artifact, family: Family) -> list[str]:
    from pipelines.evaluation import tryout

    return [each.text for each in tryout.first_words(model.path / "model", family, _corpus(model).path)]


# ---- which models ------------------------------------------------------------------------------------------------


def _models(targets: Sequence[str]) -> dict[str, Artifact]:
    """Return the models that were named, by the names that they were given.

    Raises:
        ConfigError: a target names nothing, or no model.
    """
    models: dict[str, Artifact] = {}
    for target in targets:
        named = find(target)
        if not isinstance(named, RunRecord):
            models[target] = find_model(target)
        elif made := _of_run(named):
            models |= made
        else:
            raise ConfigError(
                f"{named.id} has no model in this store", hint=f"`ingot run --recipe {named.id}` makes it"
            )
    return models


def _newest() -> dict[str, Artifact]:
    """Return the models of the newest run that has any."""
    for run in reversed(Runs(store().root).all()):
        if models := _of_run(run):
            return models
    raise ConfigError("there is no model yet", hint="`ingot run` makes one")


def _of_run(run: RunRecord) -> dict[str, Artifact]:
    """Return the models of a run by the names of their nodes, the base model first."""
    found = {
        name: store().find(node.stage, node.fingerprint)
        for name, node in run.nodes.items()
        if name in BASES or node.stage == "compress"
    }
    return {name: made for name, made in found.items() if made is not None}


def _family(models: Mapping[str, Artifact]) -> Family:
    """Return the family that all models are of.

    Raises:
        ConfigError: they are of both, which cannot be asked the same.
    """
    families = {name: folder.family_of(model.path / "model") for name, model in models.items()}
    if len(set(families.values())) > 1:
        told = ", ".join(f"{name}: {family}" for name, family in families.items())
        raise ConfigError(f"these models cannot be asked the same: {told}", hint="name models of one family")
    return next(iter(families.values()))


def _corpus(model: Artifact) -> Artifact:
    """Return the prepare artifact that a model was made from.

    Raises:
        ConfigError: it is not in this store.
    """
    key = model.manifest.identity.get("inputs", {}).get("prepare", "")
    if (prepared := store().find("prepare", key)) is None:
        raise ConfigError(
            f"the corpus of {model.manifest.node} {model.manifest.fingerprint[:8]} is not in this store: there are no "
            "held-out documents to take text from",
            hint="give prompts with --prompt, and leave out --neighbours",
        )
    return prepared


# ---- what to ask -------------------------------------------------------------------------------------------------


def _refuse_idle(family: Family, given: Sequence[str]) -> None:
    """Refuse what does nothing for models of a family."""
    idle = [name for name in given if (name in _ENCODER_ONLY) == (family == "decoder")]
    if idle:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        does = "writes on" if family == "decoder" else "fills in words, and draws none"
        raise ConfigError(f"{names} does nothing here: a{'n' * (family == 'encoder')} {family} {does}")


def _sampling(given: Mapping[str, Any]) -> SamplingSettings:
    try:
        return SamplingSettings.model_validate(given)
    except ValidationError as error:
        lines = [
            ": ".join(
                [*(f"--{str(part).replace('_', '-')}" for part in e["loc"]), e["msg"].removeprefix("Value error, ")]
            )
            for e in error.errors()
        ]
        raise ConfigError("\n".join(lines)) from None


def _piped() -> list[str]:
    """Return the lines of standard input; none where it is a terminal.

    Raises:
        ConfigError: nothing came.
    """
    if sys.stdin.isatty():
        return []
    lines = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not lines:
        raise ConfigError(
            "there is no prompt: standard input is empty", hint="give one with --prompt, or pipe in a line for each"
        )
    return lines


# ---- what is printed ---------------------------------------------------------------------------------------------


def _print(rows: Sequence[dict[str, Any]]) -> None:
    """Print the answers prompt by prompt, each under the name of its model."""
    asked = None
    for row in rows:
        if row["prompt"] != asked:
            print("" if asked is None else "\n", end="")
            asked = row["prompt"]
            print(f"> {_visible(asked)}")
        print(f"{row['model']}:")
        for line in answers.lines(row):
            print(f"    {_visible(line)}")


def _visible(text: str) -> str:
    """Return a text in which nothing commands the terminal: what a model writes may hold any byte."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
