"""What README and docs show is what there is: commands, settings, make targets, links, paths, code, words."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from flows import recipe
from flows.cli import app
from flows.config import RunConfig
from models.compression import registry
from models.objectives import registry as objectives
from pipelines.core.compute import Resources
from pipelines.core.errors import BY_EXIT_CODE
from pipelines.evaluation import probe
from pipelines.stages import STAGES
from pipelines.training.monitors import registry as monitors
from tests.docs.pages import CHECKOUT, NAMES, PLACEHOLDER, read

SECTIONS = tuple(RunConfig.model_fields)
COMMANDS = sorted({tuple(command) for name in NAMES for command in read(name).commands()})
PLANS = [
    c for c in COMMANDS if c[0] in {"plan", "run"} and len(c) > 1 and not re.search(r"models:|[A-Z]{3}", " ".join(c))
]
# Old words of the first house; names of the dictionary stand in their place.
OLD_WORDS_ALLOWED = {"CHANGELOG.md", "docs/design.md", "docs/reference/renamed-keys.md"}
OLD_WORDS = re.compile(r"\b(null arms?|arms?|children|yardstick|skeleton|coded cache)\b", flags=re.IGNORECASE)


def ingot(*arguments: str, store: Path) -> subprocess.CompletedProcess[str]:
    """Run the command on a store of its own."""
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    environment = os.environ | {"INGOT_STORE": str(store)}
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=environment)


def verb_of(arguments: tuple[str, ...]) -> tuple[Any, list[str]]:
    """Return the command that arguments lead to, and what is left of them."""
    command: Any = typer.main.get_command(app)
    rest = list(arguments)
    while hasattr(command, "commands"):
        assert rest, f"{arguments} stops at a group"
        assert rest[0] in command.commands, f"there is no verb {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    return command, rest


def has_key(path: str) -> bool:
    """Return whether a recipe may hold this dotted path."""
    models: list[Any] = [RunConfig]
    parts = [part for part in path.split(".") if not part.isdigit() and part != "*"]
    if parts[:2] == ["pretrain", "monitors"] and len(parts) > 2:
        return parts[2] in monitors.names() and set(parts[3:]) <= set(monitors.get(parts[2]).Config.model_fields)
    if parts[:2] == ["pretrain", "objective_settings"] and len(parts) > 2:
        return any(set(parts[2:]) <= set(objectives.get(name).Config.model_fields) for name in objectives.names())
    if parts[:2] == ["evaluate", "probes"] and len(parts) > 2:
        return parts[2] in probe.names() and set(parts[3:]) <= set(probe.get(parts[2]).Settings.model_fields)
    if parts[:2] == ["compute", "stages"] and len(parts) > 2:
        return parts[2] in STAGES and set(parts[3:]) <= set(Resources.model_fields)
    for part in parts:
        fields = [field for model in models for key, field in model.model_fields.items() if part in (key, field.alias)]
        if not fields:
            return parts[0] == "compress" and len(parts) == 2 and part in _method_keys()
        models = [inner for field in fields for inner in _sections(field.annotation)]
    return True


def _sections(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections(inner)]


def _method_keys() -> set[str]:
    return {key for name in registry.names() for key in registry.get(name).Config.model_fields}


def test_the_readme_is_short_and_shows_commands() -> None:
    page = read("README.md")
    assert len(page.text.splitlines()) <= 150
    assert len(page.commands()) >= 4
    assert len(set(page.verbs())) >= 14
    assert {"run", "test", "quick"} <= page.targets()


def test_every_verb_stands_in_the_readme() -> None:
    command: Any = typer.main.get_command(app)
    assert sorted(set(command.commands) - set(read("README.md").verbs())) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_verb_of_a_listing_exists(name: str) -> None:
    command: Any = typer.main.get_command(app)
    assert sorted(set(read(name).verbs()) - set(command.commands)) == []


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_that_is_shown_is_understood(command: tuple[str, ...]) -> None:
    """Verb, arguments and options are parsed as the command line does; settings are resolved over the recipe."""
    verb, rest = verb_of(command)
    if rest == ["-h"] or (len(command) == 1 and verb.params):
        return  # the bare name of a verb in running text
    context = verb.make_context("ingot", rest)
    name, overrides = context.params.get("recipe"), context.params.get("overrides") or []
    if name and not PLACEHOLDER.search(name):
        recipe.resolve(name, [o for o in overrides if not PLACEHOLDER.search(o.partition("=")[2])])
    for override in overrides:
        assert has_key(override.partition("=")[0]), f"{override} sets no key"


@pytest.mark.parametrize("command", PLANS, ids=" ".join)
def test_every_run_that_is_shown_can_be_planned(command: tuple[str, ...], tmp_path: Path) -> None:
    settings = list(command[1:])
    if "--only" in settings:  # it needs what an empty store has not
        del settings[(at := settings.index("--only")) : at + 2]
    settings = [each for each in settings if each != "--keep-going"]
    done = ingot("plan", *settings, store=tmp_path / "store")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_toml_block_is_a_part_of_a_recipe(name: str, tmp_path: Path) -> None:
    for number, block in enumerate(read(name).blocks("toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(block if "extends" in block else f'extends = "{recipe.RECIPES / "smoke.toml"}"\n{block}')
        recipe.resolve(str(path))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "docs/reference/renamed-keys.md"])
def test_every_setting_in_the_text_exists(name: str) -> None:
    found = [re.match(rf"((?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+)(?: ?=|$)", span) for span in read(name).spans()]
    named = [m[1] for m in found if m and not m[1].endswith((".py", ".toml", ".json", ".dvc", ".md"))]
    assert [key for key in named if not has_key(key) and not _is_module(key)] == []


def _is_module(name: str) -> bool:
    """`evaluate.pretrain` is a node, `compress.rtn-int8` another; they are named like settings."""
    return name in {"evaluate.pretrain"}


@pytest.mark.parametrize("name", NAMES)
def test_every_make_target_exists(name: str) -> None:
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    assert [t for t in read(name).targets() if not re.search(rf"^{t}:", makefile, flags=re.MULTILINE)] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_link_and_picture_leads_somewhere(name: str) -> None:
    page = read(name)
    broken = []
    for link in page.links():
        target, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            continue
        path = (page.path.parent / target).resolve() if target else page.path
        known = path.exists() and path.is_relative_to(CHECKOUT)
        if known and anchor and path.suffix == ".md":
            known = anchor in read(path.relative_to(CHECKOUT).as_posix()).anchors()
        broken += [] if known else [link]
    assert broken == []


@pytest.mark.parametrize("name", NAMES)
def test_every_path_exists(name: str) -> None:
    assert [path for path in read(name).paths() if not list(CHECKOUT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])  # it names what is gone
def test_every_module_and_function_exists(name: str) -> None:
    assert [dotted for dotted in read(name).modules() if not _exists(dotted)] == []


def _exists(dotted: str) -> bool:
    """Return whether a dotted name is a module of ours or a name that one defines, without importing it."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        path = CHECKOUT.joinpath(*parts[:length])
        if path.is_dir():
            return length == len(parts)
        if path.with_suffix(".py").is_file():
            text = path.with_suffix(".py").read_text(encoding="utf-8")
            return all(re.search(rf"\b{part}\b", text) for part in parts[length:])
    return False


@pytest.mark.parametrize("name", NAMES)
def test_python_blocks_are_python_and_their_imports_exist(name: str) -> None:
    for block in read(name).blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.split(".")[0] in {"models", "pipelines"}
            ):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    known = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert known, f"{node.module} has no {alias.name}"


def test_every_page_is_linked_from_another_one() -> None:
    linked = {
        (page.path.parent / link.partition("#")[0]).resolve()
        for name in NAMES
        for page in [read(name)]
        for link in page.links()
    }
    assert [name for name in NAMES if name != "README.md" and CHECKOUT / name not in linked] == []


def test_every_recipe_stands_in_the_table() -> None:
    assert [name for name in recipe.names() if f"| `{name}` |" not in read("README.md").text] == []


def test_every_exit_code_has_its_row() -> None:
    page = read("docs/reference/exit-codes.md").text
    assert [code for code in (0, *BY_EXIT_CODE) if not re.search(rf"^\| {code} \|", page, flags=re.MULTILINE)] == []


def test_every_variable_of_ours_has_its_row_and_every_row_is_read() -> None:
    sources = [path for top in ("flows", "pipelines", "models", "infra") for path in (CHECKOUT / top).rglob("*.*")]
    code = "\n".join(path.read_text() for path in sources if path.suffix in {".py", ".yaml"})
    page = read("docs/reference/environment.md").text
    assert set(re.findall(r"\bINGOT_[A-Z]+\b", page)) == set(re.findall(r"\bINGOT_[A-Z]+\b", code))


def test_what_commands_and_reports_print_uses_the_words_of_the_dictionary() -> None:
    found = []
    for path in [*(CHECKOUT / "flows").rglob("*.py"), *(CHECKOUT / "pipelines" / "report").iterdir()]:
        if path.suffix == ".py":
            nodes = list(ast.walk(ast.parse(path.read_text())))
            prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings print nothing
            texts = [n.value for n in nodes if isinstance(n, ast.Constant) and id(n) not in prose]
        else:
            texts = [path.read_text()] if path.suffix == ".j2" else []
        found += [f"{path.name}: {text}" for text in texts if isinstance(text, str) and OLD_WORDS.search(text)]
    assert found == []


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OLD_WORDS_ALLOWED])
def test_pages_use_the_words_of_the_dictionary(name: str) -> None:
    assert sorted({found.lower() for found in OLD_WORDS.findall(read(name).text)}) == []


def test_generated_pages_say_what_the_code_says() -> None:
    assert reference_pages().differences() == [], "run `make docs` and commit the pages"


def test_a_method_that_is_newer_than_the_page_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    module = reference_pages()
    shown = module.methods()
    monkeypatch.setattr(module, "methods", lambda: shown.replace("## awq", "| `new` | weight |\n\n## new\n\n## awq"))
    assert module.differences() == []


def reference_pages() -> ModuleType:
    """Return the module that writes the generated pages."""
    spec = importlib.util.spec_from_file_location("reference_pages", CHECKOUT / "infra" / "reference_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
