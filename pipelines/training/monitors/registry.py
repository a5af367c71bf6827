"""Finds monitors by file name; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models import plugins
from pipelines.training.monitors.base import Monitor


def names() -> list[str]:
    """Return the names of all monitors, sorted."""
    return plugins.names("pipelines.training.monitors")


def get(name: str) -> type[Monitor]:
    """Return the class of a monitor.

    Raises:
        ValueError: no monitor has this name; the message lists the known ones.
    """
    return plugins.load("pipelines.training.monitors", name, "Monitor", "monitor")


def make(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Monitor]:
    """Return the monitors of `pretrain.monitors`, by name."""
    return {name: get(name)(get(name).Config.model_validate(table)) for name, table in tables.items()}
