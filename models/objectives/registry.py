"""Finds pretraining objectives by file name; imports no torch."""

from __future__ import annotations

from models import plugins
from models.architectures.config import Family
from models.objectives.base import Objective

_DEFAULTS: dict[Family, str] = {"decoder": "causal", "encoder": "masked"}


def names() -> list[str]:
    """Return the names of all objectives, sorted."""
    return plugins.names("models.objectives")


def get(name: str) -> type[Objective]:
    """Return the class of an objective.

    Raises:
        ValueError: no objective has this name; the message lists the known ones.
    """
    return plugins.load("models.objectives", name, "Objective", "pretraining objective")


def default(family: Family) -> str:
    """Return the objective of a family where the recipe names none."""
    return _DEFAULTS[family]
