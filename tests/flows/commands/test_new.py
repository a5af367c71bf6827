"""A project of one's own, from a folder that is not the checkout, under a path with a space and a percent sign."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import recipe
from flows.commands import new
from pipelines.core import program, project

Ingot = Callable[..., subprocess.CompletedProcess[str]]
WORDS = [
    *("tide", "harbour", "lantern", "rope", "barrel", "gull", "mast", "anchor"),
    *("storm", "ledger", "island", "captain", "wind", "salt", "keel"),
]


def text(number: int) -> str:
    """Forty lines of words that no other number gives."""
    rng = random.Random(number)
    lines = [" ".join(f"{word}{rng.randrange(50)}" for word in rng.choices(WORDS, k=9)) for _line in range(40)]
    return f"Chapter {number}.\n" + "\n".join(lines)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder outside of every project, with a corpus of plain texts beside."""
    folder = tmp_path / "my work, 100%"
    (folder / "texts").mkdir(parents=True)
    for number in range(60):
        (folder / "texts" / f"{number}.txt").write_text(text(number))
    return folder


@pytest.fixture
def ingot(tmp_path: Path) -> Ingot:
    """The command, called in a folder that is named first, without anything of the user's environment."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "INGOT_", "GIT_"))}
    author = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org"}
    committer = {"GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.org"}
    environment = {**kept, **author, **committer, "PYTHONPATH": str(program.ROOT), "OMP_NUM_THREADS": "1"}

    def call(where: Path, *arguments: str, check: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.cli", *arguments]
        done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_a_field_of_another_name_is_told_once_and_stands_in_the_recipe(ingot: Ingot, place: Path) -> None:
    records = [json.dumps({"body": text(number)}) for number in range(60)]
    (place / "notes.jsonl").write_text("\n".join(records))
    said = ingot(place, "new", "unread", "--data", "notes.jsonl").stdout
    assert "A run would be refused for what cannot be read: " in said
    assert "--text-field; then cd " in said.splitlines()[-1]
    said = ingot(place, "new", "mine", "--data", "notes.jsonl", "--text-field", "body").stdout
    assert "\n60 documents\n" in said
    assert "refused" not in said
    assert json.loads(ingot(place / "mine", "plan", "--json").stdout)["findings"] == []


def test_one_command_leads_from_texts_to_a_plan(ingot: Ingot, place: Path) -> None:
    (place / "texts" / "scan.pdf").write_bytes(b"%PDF-1.4")
    said = ingot(place, "new", "mine", "--data", "texts").stdout
    mine = place / "mine"
    assert "plain text: 60 files" in said
    assert "\n60 documents\n" in said
    assert "about 12 documents will judge the models, the gate wants 20" in said
    assert "1 x a PDF; it is scan.pdf" in said
    assert "mine has no champion yet" in said
    assert f"cd '{mine}' && " in said.splitlines()[-1]
    assert git(mine, "status", "--porcelain") == ""
    assert {"data.dvc", "ingot.toml", "recipes/mine.toml"} <= set(git(mine, "ls-files").splitlines())
    below = mine / "recipes"
    steps = json.loads(ingot(below, "plan", "--json").stdout)["steps"]
    assert {step["state"] for step in steps} == {"run", "waits"}
    assert json.loads(ingot(below, "show", "config").stdout)["promote"]["model_name"] == "mine"
    assert ingot(mine, "data", "status").stdout.count("matches") == 1


def test_a_pattern_chooses_and_the_corpus_is_checked_before_a_run(ingot: Ingot, place: Path) -> None:
    ingot(place, "new", "mine", "--data", "texts/1*.txt")
    mine = place / "mine"
    found = json.loads(ingot(mine, "data", "check", "--json").stdout)
    assert (found["formats"], found["documents"], found["refused"]) == ({"text": 11}, 11, [])
    (mine / "data" / "picture.jpg").write_bytes(b"\xff\xd8\xff")
    ingot(mine, "data", "add")
    said = ingot(mine, "data", "check", check=3).stderr
    assert "picture.jpg: a picture" in said
    assert "picture.jpg: a picture" in ingot(mine, "plan", check=3).stdout
    assert "picture.jpg: a picture" in ingot(mine, "run", check=3).stderr
    left = 'prepare.files=["*", "!picture.jpg"]'
    assert left in said
    assert json.loads(ingot(mine, "data", "check", left, "--json").stdout)["left_out"] == ["picture.jpg"]


@pytest.mark.slow
def test_a_run_from_a_folder_below_reads_the_corpus_of_its_project(ingot: Ingot, place: Path) -> None:
    """Also where that folder has packages with the names of ours, and the stage runs in a process of its own."""
    ingot(place, "new", "mine", "--data", "texts")
    below = place / "mine" / "notebooks"
    for package in ("models", "pipelines"):
        (below / package).mkdir(parents=True)
    small = ["prepare.vocab_size=300", "prepare.sequence_length=16", "prepare.workers=1", "promote.min_documents=6"]
    said = json.loads(ingot(below, "run", *small, "--only", "prepare", "compute.parallel=2", "--json").stdout)
    prepared = said["nodes"]["prepare"]
    assert (said["project"], prepared["state"]) == (str(place / "mine"), "done")
    documents = [prepared["summary"][f"{split}_documents"] for split in ("train", "validation", "test")]
    assert min(documents) >= 6
    assert sum(documents) <= 60
    again = json.loads(ingot(place / "mine", "run", *small, "--only", "prepare", "--json").stdout)
    assert again["status"] == "cached"


def test_outside_of_a_project_the_way_in_is_named(ingot: Ingot, place: Path) -> None:
    for arguments in (("plan",), ("run",), ("status",), ("data", "status"), ("list", "runs")):
        assert "ingot new" in ingot(place, *arguments, check=2).stderr
    assert "demo" in ingot(place, "list", "recipes").stdout


def test_paths_that_are_typed_start_where_one_is(ingot: Ingot, place: Path) -> None:
    ingot(place, "new", "mine", "--data", "texts")
    (place / "mine" / "own").mkdir()
    (place / "mine" / "own" / "short.toml").write_text(
        'extends = "mine"\nstore.path = "kept"\n[pretrain]\nsteps = 60\n'
    )
    config = json.loads(ingot(place / "mine" / "own", "show", "config", "-r", "short.toml").stdout)
    assert (config["pretrain"]["steps"], config["store"]["path"]) == (60, "kept")
    typed = ["-r", "own/short.toml", "store.path=../elsewhere"]
    config = json.loads(ingot(place / "mine", "show", "config", *typed).stdout)
    assert config["store"]["path"] == str(place / "elsewhere")


def test_it_refuses_what_is_there_what_is_not_and_itself(ingot: Ingot, place: Path) -> None:
    assert "exists and is not empty" in ingot(place, "new", "texts", check=2).stderr
    assert "does not exist" in ingot(place, "new", "mine", "--data", "nowhere", check=2).stderr
    assert "inside its own corpus" in ingot(place, "new", "texts/mine", "--data", "texts", check=2).stderr
    (place / "pictures").mkdir()
    (place / "pictures" / "a.png").write_bytes(b"\x89PNG\r\n")
    assert "1 x a picture: a.png" in ingot(place, "new", "mine", "--data", "pictures", check=2).stderr
    assert not (place / "mine").exists()


def test_inside_a_repository_of_the_user_it_joins_that(ingot: Ingot, place: Path) -> None:
    git(place, "init", "--quiet")
    ingot(place, "new", "mine", "--data", "texts")
    assert not (place / "mine" / ".git").exists()
    assert "mine/data.dvc" in git(place, "status", "--porcelain", "-uall")
    assert "mine/data/" not in git(place, "status", "--porcelain", "-uall")
    ingot(place / "mine", "data", "status")


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_the_recipes_of_new_projects_can_be_planned(family: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(new.recipe("x", family, 200))
    config = recipe.resolve(str(path))
    assert (config.pretrain.family, config.promote.model_name) == (family, "x")
    assert config.prepare.test_fraction * 200 >= config.promote.min_documents


def test_few_documents_hold_out_more_of_them() -> None:
    assert [new.share(n) for n in (None, 10, 200, 300, 100_000)] == [0.035, 0.2, 0.15, 0.1, 0.035]


@pytest.mark.parametrize(
    ("folder", "name"),
    [("mine", "mine"), ("my 50% texts", "my-50-texts"), ("_x_", "x"), ("\u00e9t\u00e9", "t"), ("%", "project")],
)
def test_a_folder_gives_a_name_that_the_registry_takes(folder: str, name: str) -> None:
    assert new.model_name(folder) == name


def test_a_recipe_of_a_project_may_extend_the_one_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / project.RECIPES).mkdir()
    own = tmp_path / project.RECIPES / "smoke.toml"
    own.write_text('extends = "smoke"\n[pretrain]\nsteps = 44\n')
    assert recipe.resolve("smoke", project=tmp_path).pretrain.steps == 44
    assert recipe.resolve("smoke").pretrain.steps == 40
    own.write_text('extends = "smoke.toml"\n')
    with pytest.raises(recipe.ConfigError, match="extends itself"):
        recipe.resolve("smoke", project=tmp_path)
