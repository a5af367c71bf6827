"""`ingot compress`: one model in, a table and a folder out; with a corpus, a project, or neither."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows import recipe
from flows.commands import compress
from pipelines.core import program
from pipelines.core.errors import ConfigError
from tests.pipelines import families

WORDS = ["tide", "harbour", "lantern", "rope", "barrel", "gull", "mast", "anchor", "storm", "ledger", "island", "keel"]


def text(number: int) -> str:
    """A text of words that no other number gives."""
    rng = random.Random(number)
    return "\n".join(" ".join(f"{word}{rng.randrange(90)}" for word in rng.choices(WORDS, k=9)) for _line in range(12))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside of every project, with texts and a model beside."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "texts").mkdir()
    for number in range(60):
        (folder / "texts" / f"{number}.txt").write_text(text(number))
    families.complete("qwen2", folder / "qwen", map(text, range(20)))
    return folder


def ingot(where: Path, *arguments: str, check: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """The command in a folder, with a cache of its own and nothing of the user's environment."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "INGOT_", "GIT_"))}
    caches = {"XDG_CACHE_HOME": str(where / "cache"), "PYTHONPATH": str(program.ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flows.cli", *arguments]
    done = subprocess.run(command, cwd=where, env=kept | caches | more, capture_output=True, text=True)
    assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_a_line_ends_in_a_table_and_a_folder(place: Path) -> None:
    line = ("compress", "qwen", "--method", "rtn", "--bits", "8", "--data", "texts", "compress.0.group_size=16")
    said: dict[str, Any] = json.loads(ingot(place, *line, "--json").stdout)
    assert said["folder"] == "qwen-rtn-int8-g16"
    assert [row["model"] for row in said["models"]] == ["base", "rtn-int8-g16"]
    base, variant = said["models"]
    assert base["bits_per_byte"] > 2.0  # it was never trained
    assert variant["ratio"] == pytest.approx(1.0, abs=0.01)
    assert variant["size_bytes"] < base["size_bytes"]
    assert said["within_budget"] is (said["beyond"] is None)
    assert Path(said["report"]).is_file()
    folder = place / said["folder"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generate(**tokenizer("tide", return_tensors="pt"), max_new_tokens=3).shape[1] > 3
    assert (folder / "README.md").is_file()

    refused = ingot(place, *line, check=2)
    assert "qwen-rtn-int8-g16 exists" in refused.stderr
    again = ingot(place, *line, "--out", "again").stdout  # everything is in the store of these caches
    assert "the model as it came" in again
    assert (place / "again" / "config.json").is_file()
    (store,) = place.glob("cache/ingot/store")
    assert "mlflow" not in {path.stem for path in store.glob("*.json")}
    assert not list((store / "artifacts").glob("promote/*")), "nothing is registered"

    node = ingot(place, "compress", "base", "--bits", "4", "--dry-run", "--json", INGOT_STORE=str(store)).stdout
    assert "/artifacts/fetch/" in json.loads(node)["recipe"]  # a model of the store, by its node


def test_a_dry_run_prints_a_recipe_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    done = ingot(tmp_path, "compress", str(place / "qwen"), "--method", "gptq", "--bits", "4", "--dry-run")
    assert "Python's language reference (" in done.stderr
    assert "--data PATH takes yours" in done.stderr
    assert "Nothing was started." in done.stdout
    assert list(tmp_path.iterdir()) == [], "a dry run leaves nothing, not even a cache"
    shown = tmp_path / "shown.toml"
    shown.write_text(done.stdout.partition("# the recipe of this line\n")[2].partition("\n  stage ")[0])
    config = recipe.resolve(str(shown))
    assert (config.compress[0].method, config.compress[0].parameters.model_dump()["bits"]) == ("gptq", 4)
    assert not config.trains
    assert config.prepare.sequence_length == 64  # as many positions as the model has


@pytest.mark.parametrize(
    ("model", "method", "bits", "overrides", "message"),
    [
        ("nowhere", "rtn", None, [], "no project here"),
        ("qwen", "gptqq", None, [], "did you mean 'gptq'"),
        ("qwen", "magnitude", "4", [], "not a key of method 'magnitude'"),
        ("qwen", "rtn", "8", ['compress=[{method="rtn"},{method="gptq"}]'], "makes one variant"),
        ("texts", "rtn", "8", [], "no model folder, it has no config.json"),
    ],
)
def test_what_cannot_work_is_said_at_once(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    method: str,
    bits: str | None,
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.delenv("INGOT_STORE", raising=False)
    options: dict[str, Any] = {"data": "texts", "out": None, "dry_run": True, "as_json": True}
    with pytest.raises(ConfigError) as caught:
        compress.compress(model, method, bits, overrides, **options)
    assert message in str(caught.value)
