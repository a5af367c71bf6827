"""The whole graph by the real command: first run, cached run, changed field, damage, kill and resume."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.run_record import Runs
from pipelines.core import artifact

CHECKOUT = Path(__file__).resolve().parents[2]
Ingot = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def states(store: Path) -> dict[str, str]:
    """Node -> state of the newest run."""
    return {name: node.state for name, node in Runs(store).get().nodes.items()}


def copy_of(store: Path, folder: Path) -> Path:
    """A store of one's own that starts as a copy."""
    shutil.copytree(store, folder / "store")
    return folder / "store"


def test_a_run_ends_with_a_champion_and_a_report(smoke_store: Path, smoke_result: dict[str, Any]) -> None:
    assert smoke_result["status"] == "done"
    assert set(states(smoke_store).values()) == {"done"}
    assert smoke_result["champion"]["version"]
    page = Path(smoke_result["report"]).read_text()
    assert "<svg" in page or "data:image/png" in page


def test_what_models_write_is_kept_shown_and_sent_to_mlflow(smoke_store: Path, smoke_result: dict[str, Any]) -> None:
    nodes = {node: Path(entry["artifact"]) for node, entry in smoke_result["nodes"].items()}
    evaluated = [path for node, path in nodes.items() if node.startswith("evaluate.")]
    written = [json.loads((path / "samples.json").read_text()) for path in evaluated]
    assert len(written) == 2
    assert [row["prompt"] for row in written[0]] == [row["prompt"] for row in written[1]]
    learned = [json.loads(line) for line in (nodes["pretrain"] / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in learned] == [20, 40]
    manifest = artifact.load(nodes["pretrain"]).manifest
    assert manifest.files["samples.jsonl"].observation, "no part of the digest"
    page, card = Path(smoke_result["report"]).read_text(), (nodes["promote"] / "model_card.md").read_text()
    for prompt in (row["prompt"].split()[0] for row in written[0]):
        assert html.escape(prompt) in page
        assert html.escape(prompt, quote=False) in card
    sent = {path.name for path in (smoke_store / "mlartifacts").rglob("samples.json*")}
    assert sent == {"samples.json", "samples.jsonl"}


def test_a_normal_run_says_nothing_but_its_progress(smoke_store: Path) -> None:
    """Warnings of libraries go to the log: each line is a node with its progress, or one of our own."""
    nodes = tuple(states(smoke_store))
    ours = ("planning ...", "no Prefect server is configured", "note: ")
    said = (smoke_store / "stderr.txt").read_text().splitlines()
    assert [line for line in said if not line.startswith((*nodes, *ours))] == []


def test_the_registry_names_the_champion(smoke: Ingot) -> None:
    rows = json.loads(smoke("list", "models", "--json").stdout)
    champion = next(row for row in rows if "champion" in row["aliases"])
    assert {"name", "version", "aliases", "path", "metrics"} <= set(champion)
    assert Path(champion["path"]).exists()


def test_a_second_run_is_answered_from_the_plan(smoke: Ingot, smoke_store: Path) -> None:
    before = len(Runs(smoke_store).all())
    code = (
        "import sys\nfrom flows.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch._C', 'prefect', 'mlflow', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "--recipe", "smoke"],
        cwd=CHECKOUT, capture_output=True, text=True, env=os.environ | {"INGOT_STORE": str(smoke_store)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nothing was run" in done.stdout
    assert len(Runs(smoke_store).all()) == before


def test_lineage_leads_from_the_champion_to_the_corpus(smoke: Ingot) -> None:
    shown = smoke("show", "evaluate.pretrain").stdout
    assert "pretrain" in shown
    assert "corpus: data.dvc" in shown


def test_exported_models_load_in_plain_transformers(smoke: Ingot, tmp_path: Path) -> None:
    smoke("export", "champion", str(tmp_path / "model"))
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('To be, or', return_tensors='pt')['input_ids']\n"
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=4)[0]))\n"
        "assert not any(name.split('.')[0] in {'flows', 'pipelines', 'models'} for name in sys.modules)"
    )
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_one_changed_field_reruns_exactly_what_reads_it(smoke_store: Path, tmp_path: Path, run_in: Ingot) -> None:
    store = copy_of(smoke_store, tmp_path)
    done = run_in(store, "run", "--recipe", "smoke", "evaluate.tasks.items=6", check=0)
    assert "evaluate.tasks.items: 8 -> 6" in done.stdout
    found = states(store)
    assert {name for name, state in found.items() if state == "done"} == {
        name for name in found if name.startswith(("evaluate.", "compare.", "promote"))
    }


def test_a_flipped_byte_is_named_with_both_hashes_and_nothing_is_overwritten(
    smoke_store: Path, tmp_path: Path, run_in: Ingot
) -> None:
    store = copy_of(smoke_store, tmp_path)
    weights = next(store.glob("artifacts/pretrain/*/model/model.safetensors"))
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    for arguments in (("verify",), ("run", "--recipe", "smoke", "evaluate.tasks.items=5")):
        done = run_in(store, *arguments, check=3)
        assert "model.safetensors" in done.stderr
        assert "expected sha256" in done.stderr
        assert "found" in done.stderr
    assert weights.read_bytes() == damaged


def test_a_killed_run_leaves_nothing_behind_and_the_same_command_finishes_it(
    smoke_store: Path, empty_store: Path, run_in: Ingot, environment_of: Callable[[Path], dict[str, str]]
) -> None:
    shutil.copytree(smoke_store / "artifacts" / "prepare", empty_store / "artifacts" / "prepare")
    command = [sys.executable, "-c", "from flows.cli import main; main()", "run", "--recipe", "smoke"]
    log = empty_store / "killed.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=CHECKOUT, env=environment_of(empty_store), stdout=stream, stderr=stream)
        deadline = time.monotonic() + 240
        while not list(empty_store.glob("scratch/pretrain-*/**/step-*/manifest.json")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == []
    assert [row["status"] for row in json.loads(run_in(empty_store, "list", "runs", "--json", check=0).stdout)] == [
        "killed"
    ]
    run_in(empty_store, "resume", check=0)
    models = [
        {path.relative_to(store): path.read_bytes() for path in store.glob("artifacts/pretrain/*/model/*.safetensors")}
        for store in (empty_store, smoke_store)
    ]
    assert models[0] == models[1]
    assert list(empty_store.glob("artifacts/*/.building-*")) == []


def test_the_champion_is_tuned_and_the_plan_and_the_lineage_say_from_which_version(
    smoke_store: Path, tmp_path: Path, run_in: Ingot
) -> None:
    store = copy_of(smoke_store, tmp_path)
    tune = ["--recipe", "smoke", "base.from=models:/ingot-smoke@champion", "pretrain.steps=4"]
    tune += ["pretrain.schedule.warmup=0", "pretrain.engine=plain", "pretrain.world_size=1", "pretrain.zero_stage=0"]
    planned = run_in(store, "plan", *tune, "--json")
    fetch = {step["node"]: step for step in json.loads(planned.stdout)["steps"]}["fetch"]
    assert "models:/ingot-smoke@champion is version 1" in fetch["warning"]
    run_in(store, "run", *tune, "--only", "fetch")
    run_in(store, "run", *tune, "--only", "pretrain")
    record = Runs(store).get()
    assert record.init_weights == "models:/ingot-smoke/1"
    made = artifact.load(Path(str(record.nodes["pretrain"].artifact)))
    assert made.manifest.summary["init_from"] == "models:/ingot-smoke/1"
    shown = run_in(store, "show", made.manifest.fingerprint[:12]).stdout
    assert "init_weights: fetch" in shown
    assert "from: models:/ingot-smoke/1" in shown
    states = {
        step["node"]: step["state"] for step in json.loads(run_in(store, "plan", *tune, "--json").stdout)["steps"]
    }
    assert (states["fetch"], states["pretrain"]) == ("cached", "cached")


def test_gc_keeps_what_the_newest_run_and_the_champion_need(smoke_store: Path, tmp_path: Path, run_in: Ingot) -> None:
    store = copy_of(smoke_store, tmp_path)
    extra = store / "artifacts" / "pretrain" / ("0" * 32)
    build = tmp_path / "build"
    build.mkdir()
    (build / "payload.txt").write_text("of no run")
    artifact.publish(build, extra, stage="pretrain", node="pretrain", identity={"of": "no run"}, parents={}, summary={})
    assert str(extra) in run_in(store, "gc", "--dry-run", check=0).stdout
    assert extra.exists()
    run_in(store, "gc", "--yes", check=0)
    assert not extra.exists()
    assert "nothing was run" in run_in(store, "run", "--recipe", "smoke", check=0).stdout


def test_a_decoder_is_exported_as_gguf_and_refused_as_onnx(smoke: Ingot, tmp_path: Path) -> None:
    said = smoke("export", "champion", str(tmp_path / "m.gguf"), "--format", "gguf", "--precision", "q8_0").stdout
    assert "load it with llama.cpp" in said
    assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"
    refused = smoke("export", "champion", str(tmp_path / "onnx"), "--format", "onnx", check=2)
    assert "--format gguf" in refused.stderr
