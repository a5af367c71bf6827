"""What can be known before a run is said before Prefect starts, by plan and run alike."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import preflight, run_plan
from flows.commands import run as run_command
from flows.planner import Selection
from flows.run_plan import RunPlan
from pipelines.core import artifact, disk, machine
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, DiskFullError, IntegrityError
from pipelines.core.program import ROOT
from pipelines.registry import evidence, mlflow_database
from pipelines.registry.initial_weights import Source

Plan = Callable[..., RunPlan]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store, 100%"


@pytest.fixture
def plan(store: Path, tmp_path: Path) -> Plan:
    """Plan the recipe `smoke` in a project with a corpus of one line, as `data.dvc` names it."""
    root = tmp_path / "project"
    (root / "data").mkdir(parents=True)
    (root / "data" / "a.jsonl").write_text('{"text": "x"}\n')
    (root / ".dvc").mkdir()
    (root / ".dvc" / "config").write_text("")
    from pipelines.data import versioning

    digest = versioning.hash_tree(versioning.hash_files(root / "data"))
    (root / "data.dvc").write_text(f"outs:\n- {{md5: {digest}, size: 14, nfiles: 1, path: data}}\n")
    (root / "ingot.toml").write_text('recipe = "smoke"')

    def make(*overrides: str, **named: Any) -> RunPlan:
        return run_plan.make(None, [f"store.path={store}", *overrides], project=root, **named)

    return make


def publish(plan: RunPlan, node: str, files: dict[str, str], **summary: Any) -> Artifact:
    """Put an artifact of a node into the store of a plan."""
    known = plan.graph[node]
    stage = known.node.stage.name
    build = plan.store.build_folder(stage, known.resume_key)
    for name, text in files.items():
        (build / name).parent.mkdir(parents=True, exist_ok=True)
        (build / name).write_text(text)
    place = plan.store.path(stage, known.fingerprint)
    identity = dict(known.identity)
    return artifact.publish(build, place, stage=stage, node=node, identity=identity, parents={}, summary=summary)


def crown(store: Path, **facts: str) -> None:
    """Let the registry of a store have a champion, in the tables of MLflow that a plan reads."""
    store.mkdir(parents=True, exist_ok=True)
    (revision,) = mlflow_database.SCHEMAS
    with contextlib.closing(sqlite3.connect(store / "mlflow.db")) as database, database:
        for table in (
            "alembic_version (version_num)",
            "registered_models (name, workspace)",
            "registered_model_tags (name, key, value)",
            "registered_model_aliases (name, alias, version)",
            "model_versions (name, version, source, current_stage)",
            "model_version_tags (name, version, key, value)",
        ):
            database.execute(f"CREATE TABLE {table}")
        database.execute("INSERT INTO alembic_version VALUES (?)", (revision,))
        database.execute("INSERT INTO registered_models VALUES ('ingot-smoke', 'default')")
        database.execute("INSERT INTO registered_model_aliases VALUES ('ingot-smoke', 'champion', 1)")
        database.execute("INSERT INTO model_versions VALUES ('ingot-smoke', 1, 'elsewhere', NULL)")
        rows = [("ingot-smoke", 1, key, value) for key, value in facts.items()]
        database.executemany("INSERT INTO model_version_tags VALUES (?, ?, ?, ?)", rows)


def certain(plan: RunPlan) -> list[str]:
    return [finding.check for finding in preflight.check(plan) if finding.error is not None]


def test_nothing_speaks_against_a_sound_run(plan: Plan) -> None:
    assert preflight.check(plan("compute.device=cpu")) == []


def test_a_corpus_that_changed_is_found(plan: Plan) -> None:
    made = plan()
    (made.project / "data" / "a.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(IntegrityError, match=r"a\.jsonl|is not the corpus that was recorded"):
        preflight.refuse(preflight.check(made))


def test_a_corpus_that_is_nowhere_is_said(plan: Plan) -> None:
    made = plan()
    (made.project / "data" / "a.jsonl").unlink()
    (made.project / "data").rmdir()
    assert [f.check for f in preflight.corpus(made)] == ["corpus"]
    (made.project / ".dvc" / "config").write_text("['remote \"r\"']\n    url = s3://b/x\n")
    assert list(preflight.corpus(made)) == []


def published(made: RunPlan, node: str, text: str) -> Artifact:
    """Put a prepared corpus or a model with this held-out text and a tokenizer that follows from it into the store."""
    folder = "tokenizer" if node == "prepare" else "model"
    return publish(made, node, {evidence.TEST_SPLIT: text, f"{folder}/tokenizer.json": f"of {text}"})


def test_a_champion_on_another_corpus_is_said_to_be_measured_again(plan: Plan, store: Path) -> None:
    crown(store, family="decoder", test_digest="0" * 64, dvc_hash="other.dir")
    (found,) = preflight.model_name(plan())
    assert (found.error, "another corpus" in found.message) == (None, True)
    assert "promote.model_name=" in found.do
    assert list(preflight.model_name(plan("promote.model_name=mine"))) == []
    assert list(preflight.model_name(plan("promote.allow_new_test_set=true"))) == []


@pytest.mark.parametrize(("family", "error"), [("decoder", None), ("encoder", ConfigError)])
def test_an_encoder_is_refused_as_soon_as_its_text_and_its_tokenizer_are_known(
    family: str, error: type[ConfigError] | None, plan: Plan, store: Path
) -> None:
    """Its champion cannot be measured again: the masks would hide other bytes."""
    kind = [f"pretrain.family={family}"]
    old = plan("prepare.seed=5", *kind)
    published(old, "prepare", "others")
    crown(store, family=family, fingerprint=published(old, "pretrain", "others").manifest.fingerprint)
    assert list(preflight.model_name(plan(*kind))) == []
    published(plan(*kind), "prepare", "held out")
    (found,) = preflight.model_name(plan(*kind))
    assert (found.error, "other held-out text" in found.message) == (error, True)


def test_a_champion_on_the_same_held_out_text_is_no_obstacle(plan: Plan, store: Path) -> None:
    """Also when the corpus grew meanwhile: what counts is the held-out part."""
    prepared, model = (published(plan(), node, "held out") for node in ("prepare", "pretrain"))
    fingerprint, digest = model.manifest.fingerprint, evidence.test_digest(prepared)
    crown(store, family="decoder", fingerprint=fingerprint, test_digest=digest, dvc_hash="smaller.dir")
    assert list(preflight.model_name(plan())) == []


def test_a_champion_of_the_other_family_is_never_compared(plan: Plan, store: Path) -> None:
    crown(store, family="encoder", test_digest="0" * 64)
    (found,) = preflight.model_name(plan())
    assert found.error is ConfigError
    assert "encoder" in found.message


def test_too_little_held_out_text_is_found_as_soon_as_it_is_known(plan: Plan) -> None:
    assert list(preflight.held_out(plan())) == []
    publish(plan(), "prepare", {evidence.TEST_SPLIT: "x"}, test_documents=7)
    (found,) = preflight.held_out(plan())
    assert (found.error, "7 documents" in found.message) == (ConfigError, True)
    assert list(preflight.held_out(plan("promote.min_documents=7"))) == []
    assert ["max_documents" in f.message for f in preflight.held_out(plan("evaluate.max_documents=9"))] == [True, False]


@pytest.mark.parametrize(
    ("overrides", "there", "build", "found"),
    [
        (["compute.device=cuda"], 0, "cu130", [ConfigError]),
        (["compute.device=cuda"], 2, "cpu", [ConfigError]),
        (["pretrain.world_size=2"], 1, "cu130", [ConfigError]),
        (["pretrain.precision=bf16"], 0, "cpu", [None]),
        (["compute.device=cpu"], 0, "cpu", []),
        (["compute.device=cuda"], 0, "rocm7", []),
        ([], 8, "cu130", []),
    ],
)
def test_gpus_that_are_asked_for_and_not_there(
    plan: Plan, overrides: list[str], there: int, build: str, found: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "gpu_count", lambda: there)
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: f"2.13.0+{build}")
    assert [each.error for each in preflight.gpus(plan(*overrides))] == found


@pytest.mark.parametrize(("listed", "count"), [(None, 2), ("", 0), ("1", 1), ("0,1", 2), ("0,1,2", 2)])
def test_gpus_are_counted_as_the_processes_will_see_them(
    listed: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559'\necho 'NVIDIA H100, 81559'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    machine.gpus_here.cache_clear()
    assert machine.gpu_count() == count
    machine.gpus_here.cache_clear()


def test_a_disk_without_room_is_found_before_the_first_step(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan("compute.device=cpu")
    sizes = [step.estimate.disk_bytes or 0 for step in made.steps]
    assert max(sizes) > 0
    for free, error in ((max(sizes) - 1, [DiskFullError]), (sum(sizes) - 1, [None]), (sum(sizes), [])):
        monkeypatch.setattr(disk, "free", lambda _folder, free=free: free)
        assert [finding.error for finding in preflight.space(made)] == error


def test_a_store_that_cannot_be_written_to_is_found(plan: Plan, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan()
    assert list(preflight.writable(made)) == []
    monkeypatch.setattr(preflight.os, "access", lambda *_: False)
    (found,) = preflight.writable(made)
    assert found.error is ConfigError
    assert f"cannot be written to: {store.parent}: permission denied" in found.message
    assert "INGOT_STORE" in found.do
    assert "store" in certain(made)
    store.write_text("a file")
    (found,) = preflight.writable(made)
    assert "is not a folder" in found.message


def test_a_stage_alone_needs_what_it_reads(plan: Plan) -> None:
    made = plan(selection=Selection(only="pretrain"))
    (found,) = preflight.parents(made)
    assert (found.error, "prepare was not run yet" in found.message) == (ConfigError, True)
    assert "--only prepare" in found.do
    publish(made, "prepare", {evidence.TEST_SPLIT: "x"})
    assert list(preflight.parents(plan(selection=Selection(only="pretrain")))) == []


def test_a_foreign_tokenizer_is_found(plan: Plan, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    def saved(folder: Path, *words: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token=words[0])).save(
            str(folder / "tokenizer.json")
        )

    model = tmp_path / "model"
    saved(model, "a", "b")
    source = Source(str(model), "0" * 64, "", "")
    made = dataclasses.replace(plan(), init_weights=source)
    (found,) = preflight.tokenizer(made)
    assert (found.error, found.do) == (None, "prepare.tokenizer=init_weights takes the model's")
    saved(tmp_path / "ours", "b", "a")
    text = (tmp_path / "ours" / "tokenizer.json").read_text()
    publish(made, "prepare", {"tokenizer/tokenizer.json": text})
    (found,) = preflight.tokenizer(made)
    assert found.error is ConfigError
    assert "another tokenizer" in found.message
    saved(model, "b", "a")
    assert list(preflight.tokenizer(made)) == []


def test_a_run_is_refused_before_prefect_starts_and_its_plan_says_so(
    ingot: Callable[..., subprocess.CompletedProcess[str]], empty_store: Path
) -> None:
    crown(empty_store, family="encoder")
    said = ingot("plan", "--recipe", "smoke", check=2)
    assert "would be refused: the champion ingot-smoke v1" in said.stdout
    told = json.loads(ingot("plan", "--recipe", "smoke", "--json", check=2).stdout)
    assert told["exit_code"] == 2
    assert {step["node"] for step in told["steps"]} >= {"prepare", "promote"}
    (certain,) = (finding for finding in told["findings"] if finding["exit_code"] is not None)
    assert certain["check"] == "model name"
    assert certain["message"].startswith("the champion ingot-smoke v1")
    assert "promote.model_name=" in certain["do"]
    refused = ingot("run", "--recipe", "smoke", check=2)
    assert "promote.model_name=" in refused.stderr
    assert "Prefect" not in refused.stdout + refused.stderr
    assert not (empty_store / "runs").exists()
    assert (ROOT / "data.dvc").exists()


def test_several_findings_are_told_at_once() -> None:
    findings = [preflight.Finding(f"c{n}", f"message {n}", f"do {n}", ConfigError if n else None) for n in range(3)]
    with pytest.raises(ConfigError) as caught:
        preflight.refuse(findings)
    assert str(caught.value) == "message 1\n  -> do 1\nmessage 2\n  -> do 2"
    preflight.refuse(findings[:1])


def test_ranks_are_refused_where_nothing_is_trained(tmp_path: Path) -> None:
    """They were an override of `pretrain`, a section whose presence switches the training on."""
    mine = tmp_path / "mine.toml"
    mine.write_text('[base]\nfrom = "/models/mine"\n')
    with pytest.raises(ConfigError, match="this run trains nothing, so it has no ranks"):
        run_command.plan(str(mine), [], None, None, [], as_json=True, world_size=2)
