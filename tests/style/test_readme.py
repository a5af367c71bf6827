"""The README's commands are the ones that work: verbs, options, recipes, overrides, make targets, paths."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flows import recipe

CHECKOUT = Path(__file__).resolve().parents[2]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n(.*?)```", README, flags=re.DOTALL)
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = sorted({line.removeprefix(".venv/bin/") for line in LINES if line.startswith(".venv/bin/ingot ")})
VERBS = sorted({line.split()[1] for line in LINES if re.match(r"ingot \w+", line)})


def ingot(*arguments: str, store: Path) -> subprocess.CompletedProcess[str]:
    """Run the command on a store of its own."""
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    environment = os.environ | {"INGOT_STORE": str(store)}
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=environment)


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 4
    assert len(VERBS) >= 14


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_is_shown_exists(verb: str, tmp_path: Path) -> None:
    assert ingot(verb, "-h", store=tmp_path).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_line_that_is_shown_is_understood(command: str, tmp_path: Path) -> None:
    """Running and exporting are shown to be understood by planning, which resolves the same arguments."""
    arguments = shlex.split(command)[1:]
    if arguments[0] == "run":
        arguments[0] = "plan"
    if arguments[0] in {"data", "export"}:
        arguments = [*(a for a in arguments if not a.startswith(("/", "s3://"))), "-h"]
    done = ingot(*arguments, store=tmp_path / "store")
    assert done.returncode == 0, done.stderr


def test_every_make_target_that_is_shown_exists() -> None:
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`make ([a-z-]+)`", README)) | {
        line.split()[1] for line in LINES if line.startswith("make ")
    }
    assert {"run", "test"} <= targets
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, flags=re.MULTILINE)] == []


def test_every_recipe_stands_in_the_table() -> None:
    assert [name for name in recipe.names() if f"| `{name}` |" not in README] == []


def test_every_picture_exists() -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    assert [p for p in pictures if not (CHECKOUT / p).is_file()] == []


def test_every_file_of_the_tree_exists() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    folder = ""
    for line in tree.splitlines():
        words = line.split()
        if not words:
            continue
        folder = words[0] if not line.startswith(" ") else folder
        for word in words:
            if re.fullmatch(r"[a-z_]+\.py|[a-z_-]+/|[a-z]+\.(dvc|txt|yaml)", word):
                name = word.rstrip("/")
                known = (CHECKOUT / name).exists() or any((CHECKOUT / folder).rglob(name))
                assert known, f"{word} of {line!r}"
