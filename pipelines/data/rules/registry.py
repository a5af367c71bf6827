"""Finds rules by file name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models import plugins
from pipelines.core.settings import validated_at
from pipelines.data.rules.base import Rule, RuleConfig

_PACKAGE = "pipelines.data.rules"


def names() -> list[str]:
    """Return the names of all rules, sorted."""
    return plugins.names(_PACKAGE)


def get(name: str) -> type[Rule]:
    """Return the class of a rule.

    Raises:
        ValueError: no rule has this name; the message lists the known ones.
    """
    return plugins.load(_PACKAGE, name, "Rule", "rule")


def settings(table: Any, place: str, start: Path | None) -> RuleConfig:
    """Return the settings of one table of `prepare.rules`.

    Args:
        table: as the recipe has it.
        place: its position in the list, for errors.
        start: where relative paths start; None for the working directory.

    Raises:
        ValueError: it names no rule, or the rule refuses it.
    """
    if isinstance(table, RuleConfig):
        return table
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        raise ValueError(f"rule {place}: a rule is a table with a `name` ({', '.join(names())})")
    kind = get(table["name"]).Config
    return validated_at(kind, kind.placed(dict(table), start), place)


def make(configured: tuple[RuleConfig, ...], folder: Path | None = None) -> list[Rule]:
    """Return the rules of a recipe, in order.

    Args:
        configured: their settings.
        folder: where those that learn keep what they have learned.
    """
    return [
        get(one.name)(one, folder / f"rule-{number}.npz" if folder else None) for number, one in enumerate(configured)
    ]
