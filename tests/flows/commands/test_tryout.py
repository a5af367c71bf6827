"""ingot try: which models are asked, what is refused before one is loaded, and the command on a finished run."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.commands import tryout
from flows.run_record import NodeRecord, Runs
from pipelines.core import artifact, fingerprint
from pipelines.core.errors import ConfigError
from pipelines.core.store import LocalStore
from tests.flows.conftest import CHECKOUT, environment

Made = Callable[..., None]
LLAMA, BERT = "LlamaForCausalLM", "ModernBertForMaskedLM"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """The store that the command uses."""
    monkeypatch.setenv("INGOT_STORE", str(tmp_path / "store"))
    return LocalStore(tmp_path / "store")


@pytest.fixture
def made(store: LocalStore) -> Made:
    """Publish the model of a node with nothing but the name of its architecture, and record a run that made it."""

    def publish(*nodes: str, architecture: str = LLAMA) -> None:
        records = {}
        for node in nodes:
            stage = node.partition(".")[0]
            build = store.build_folder(stage, node)
            (build / "model").mkdir()
            (build / "model" / "config.json").write_text(json.dumps({"architectures": [architecture]}))
            identity = {"node": node, "architecture": architecture}
            key = fingerprint.digest(identity)
            final = store.path(stage, key)
            artifact.publish(build, final, stage=stage, node=node, identity=identity, parents={}, summary={})
            records[node] = NodeRecord(stage=stage, fingerprint=key, state="done", artifact=str(final))
        runs = Runs(store.root)
        runs.finish(runs.start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes=records), "done", 0)

    return publish


def ask(*targets: str, prompts: tuple[str, ...] = ("a",), **options: Any) -> None:
    extra = {"neighbours": options.pop("neighbours", False), "count": options.pop("count", None)}
    tryout.run(targets, prompts, options, **extra, as_json=True)


@pytest.mark.parametrize(
    ("architecture", "options", "said"),
    [
        (LLAMA, {"neighbours": True}, "--neighbours does nothing here: a decoder writes on"),
        (LLAMA, {"count": 3}, "--count does nothing here"),
        (LLAMA, {"top_k": 5, "temperature": 0.0}, "top_k does nothing with temperature 0"),
        (LLAMA, {"top_p": 1.0}, "--top-p: Input should be less than 1"),
        (LLAMA, {"temperature": -1.0}, "--temperature: Input should be greater than or equal to 0"),
        (BERT, {"temperature": 0.5}, "--temperature does nothing here: an encoder fills in words"),
        (BERT, {"max_new_tokens": 5, "seed": 1}, "--max-new-tokens, --seed does nothing here"),
        (BERT, {"neighbours": True}, "the corpus of pretrain .* is not in this store"),
    ],
)
def test_what_does_nothing_is_refused_before_a_model_is_loaded(
    architecture: str, options: dict[str, Any], said: str, made: Made
) -> None:
    made("pretrain", architecture=architecture)
    with pytest.raises(ConfigError, match=said):
        ask(**options)


def test_models_are_named_or_those_of_the_newest_run_that_has_any(store: LocalStore, made: Made) -> None:
    with pytest.raises(ConfigError, match="there is no model yet"):
        ask()
    made("pretrain", "compress.rtn")
    made("pretrain", architecture=BERT)
    made()
    with pytest.raises(ConfigError, match="has no model in this store"):
        ask(Runs(store.root).all()[-1].id)
    assert list(tryout._newest()) == ["pretrain"]
    oldest = Runs(store.root).all()[0].id
    assert list(tryout._models([oldest])) == ["pretrain", "compress.rtn"]
    assert list(tryout._models(["compress.rtn"])) == ["compress.rtn"]
    with pytest.raises(ConfigError, match=r"cannot be asked the same: compress\.rtn: decoder, pretrain: encoder"):
        ask("compress.rtn", "pretrain")


def test_prompts_are_the_lines_of_standard_input_and_an_empty_one_is_refused(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n two \n"))
    assert tryout._piped() == ["one", " two "]
    made("pretrain")
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    with pytest.raises(ConfigError, match="standard input is empty"):
        ask(prompts=())


def test_nothing_that_a_model_writes_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "p\x07", "model": "m", "text": "a\x1b[2Jb\u202ec\n\td\x9b"},
        {"prompt": "p\x07", "model": "n", "text": ""},
    ]
    tryout._print(rows)
    shown = capsys.readouterr().out
    assert shown.count("> p\\x07") == 1
    assert "a\\x1b[2Jb\\u202ec\n" in shown
    assert "\td\\x9b" in shown
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_models_of_a_finished_run_write_side_by_side(smoke_store: Path) -> None:
    """In processes of its own: from standard input, in two orders, with one seed."""

    def call(*arguments: str, asked: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-c", "from flows.cli import main; main()", "try", *arguments, "--json"]
        done = subprocess.run(
            command, cwd=CHECKOUT, env=environment(smoke_store), input=asked, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "nothing but answers"
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows

    options = ("--max-new-tokens", "12", "--temperature", "1.2", "--seed", "4")
    rows = call(*options, asked="In the beginning\nReturn the\n")
    variant = next(row["model"] for row in rows if row["model"] != "pretrain")
    both = ["pretrain", variant]
    assert [(row["prompt"], row["model"]) for row in rows] == [
        (prompt, model) for prompt in ("In the beginning", "Return the") for model in both
    ]
    assert all(row["text"] for row in rows)
    turned = call(variant, "pretrain", *options, asked="Return the\nIn the beginning\n")
    assert sorted(map(json.dumps, turned)) == sorted(map(json.dumps, rows))
