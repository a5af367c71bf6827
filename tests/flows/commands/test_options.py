"""The options that every verb takes."""

from __future__ import annotations

import importlib
from typing import Any

import typer

from flows.cli import app


def test_the_command_can_be_built_when_its_verbs_are_loaded() -> None:
    """A verb's module called `list` must not stand for the type where annotations are evaluated."""
    importlib.import_module("flows.commands.list")
    command: Any = typer.main.get_command(app)
    assert "list" in command.commands
