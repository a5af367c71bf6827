"""new: a project of one's own, with its corpus, recipe, store, git and DVC, beside the program and beside others."""

from __future__ import annotations

import contextlib
import glob
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from flows import run_plan
from flows.commands import run as run_command
from pipelines.core import program, project
from pipelines.core.errors import ConfigError
from pipelines.data import check, importing, reader, recording
from pipelines.data.config import DataConfig, FieldNames, PrepareConfig
from pipelines.registry.config import PromoteConfig

TEMPLATES = Path(__file__).parents[1] / "templates"
_WANTED: int = PromoteConfig().min_documents
FILES = {
    ".gitignore": "/.ingot/\n/data/\n__pycache__/\n.venv\n",
    ".dvc/config": "[core]\n    analytics = false\n    autostage = false\n    check_update = false\n",
    ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
    ".dvcignore": "# Patterns of files that DVC leaves out.\n",
    "dvc.yaml": """# What `dvc metrics diff` and `dvc plots diff` compare. The stages are Ingot's: DVC runs none.
metrics:
  - results/metrics.json
plots:
  - loss:
      x: step
      y:
        results/training.csv: [loss, validation_loss]
""",
}
"""What a project begins with: path -> text."""
MARKER = """# This file marks a project of Ingot: commands find it from any folder below.
recipe = "{name}"  # what `ingot plan` and `ingot run` take where none is named: recipes/{name}.toml
"""
"""`ingot.toml` of a project whose recipe is {name}."""


def new(place: str, data: str | None, family: str, text_field: str = "text") -> None:
    """Make a project, take a corpus into it, and print the first plan.

    Args:
        place: folder to create; its name names recipe and registered model.
        data: folder, file or URL with the corpus; None leaves that for later.
        family: decoder or encoder.
        text_field: of a record; the recipe names it where it is not `text`.

    Raises:
        ConfigError: something is there already, or holds no corpus.
    """
    folder = Path(place).expanduser().resolve()
    source = None if data is None or "://" in data else Path(data).expanduser().resolve()
    _check(folder, source, data)
    name = model_name(folder.name)
    with _removed_unless_complete(folder):
        for relative, text in FILES.items():
            write(folder / relative, text)
        own = _git_init(folder)
        fields = FieldNames(text=text_field)
        documents, refused, said = (None, [], []) if data is None else take(folder, source, data, fields)
        write(folder / project.RECIPES / f"{name}.toml", recipe(name, family, documents, text_field))
        write(folder / project.MARKER, MARKER.format(name=name))  # last: it makes a project of the folder
    said += _commit(folder) if own else [f"git: commit {folder} in the repository around it"]
    print("\n".join([f"{folder}: recipe {project.RECIPES}/{name}.toml, registered model {name}", *said]))
    if data is None:
        print(f"Next: put texts into {shlex.quote(str(folder / 'data'))}, then")
        print(f"  cd {shlex.quote(str(folder))} && {command()} data add && {command()} plan")
        return
    run_command.print_plan(run_plan.make(project=folder))
    then = f"cd {shlex.quote(str(folder))} && {command()} run"
    if refused:
        print(f"A run would be refused for what cannot be read: {'; '.join(refused)}")
        then = f"see to that, in {project.RECIPES}/{name}.toml or in a new project with --text-field; then {then}"
    print(f"Next: {then}")


def recipe(name: str, family: str, documents: int | None, text_field: str = "text") -> str:
    """Return the text of a first recipe for a corpus of so many documents; None: not known yet."""
    text = (TEMPLATES / f"{family}.toml").read_text(encoding="utf-8")
    if text_field != "text":
        field = json.dumps(text_field, ensure_ascii=False)
        text = text.replace(
            "[prepare]\n", f"[prepare]\nfields.text = {field}   # field of a record that holds the text\n"
        )
    return text.replace("NAME", name).replace("SHARE", f"{share(documents):g}")


def share(documents: int | None) -> float:
    """Return the share of the works that validation and test hold out each: more where there are few documents."""
    return round(min(0.2, max(0.035, 1.5 * _WANTED / max(documents or 1, 1))), 3) if documents else 0.035


def model_name(folder: str) -> str:
    """Return the name of a registered model made of a folder's name: letters, digits, dots, dashes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder).strip("-._") or "project"


def command() -> str:
    """Return how to call this program from any folder."""
    called = Path(sys.argv[0])
    if called.name != "ingot":
        return f"{shlex.quote(sys.executable)} -m flows.cli"
    on_path = shutil.which("ingot")
    known = on_path is not None and Path(on_path).resolve() == called.resolve()
    return "ingot" if known else shlex.quote(str(called.absolute()))


def _check(folder: Path, source: Path | None, data: str | None) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty", hint="name a new folder")
    if source is not None and not source.exists() and not glob.has_magic(str(source)):
        raise ConfigError(f"--data {data}: {source} does not exist", hint="give a folder, a file, a pattern or a URL")
    if source is not None and folder.is_relative_to(source):
        raise ConfigError(f"{folder} would lie inside its own corpus {source}", hint="name a folder beside it")


@contextlib.contextmanager
def _removed_unless_complete(folder: Path) -> Iterator[None]:
    """Remove what was made of a project when the block fails."""
    there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if there:
            folder.mkdir()
        raise


def take(folder: Path, source: Path | None, data: str, fields: FieldNames) -> tuple[int, list[str], list[str]]:
    """Bring the corpus into the project and record it; return the documents, what refuses a run, and what to say."""
    settings, path = DataConfig(), folder / DataConfig().path
    taken = importing.bring(data if source is None else str(source), path, folder / ".dvc" / "tmp" / "ingot-import")
    recorded = recording.add(settings, folder, source=data if source is None else str(source))
    found = check.check(path, reader.relative_names(path, folder), PrepareConfig(fields=fields), gate_documents=_WANTED)
    documents = found["documents"]
    about = "" if found["documents_exact"] else "about "
    said = [*importing.summary(taken), f"data.dvc: {recorded['files']} files, {recorded['bytes']:,} bytes"]
    said.append(f"{about}{documents:,} documents")
    said += [f"{one['what']}\n  -> {one['do']}" for one in found["refused"]]
    if (held_out := round(share(documents) * documents)) < _WANTED:
        said.append(f"about {held_out} documents will judge the models, the gate wants {_WANTED} (min_documents)")
    return documents, [one["what"].splitlines()[0].rstrip(":") for one in found["refused"]], said


def _git_init(folder: Path) -> bool:
    """Make the folder a git repository, unless it lies in one that is not the program's; return whether it was made."""
    around = _git(folder, "rev-parse", "--show-toplevel")
    if around.returncode == 0 and Path(around.stdout.strip()).resolve() != program.ROOT:
        return False
    started = _git(folder, "init", "--quiet")
    if started.returncode:
        raise ConfigError(f"git init failed in {folder}: {started.stderr.strip()}")
    return True


def _commit(folder: Path) -> list[str]:
    """Commit everything; where git knows nobody to do it as, say the command."""
    _git(folder, "add", "--all")
    done = _git(folder, "commit", "--quiet", "-m", "A project of Ingot")
    if done.returncode == 0:
        return ["git: committed"]
    why = next(iter(done.stderr.strip().splitlines()), "no reason given")
    return [f"git: not committed ({why}); commit it yourself: a revision of the corpus is one of git"]


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise ConfigError("git is not installed", hint="install git: it versions recipes and data.dvc") from None


def write(path: Path, text: str) -> None:
    """Write a text file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
