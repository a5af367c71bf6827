"""Promotion on a real MLflow database: what is registered, what is refused, and that nothing is left between."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaml

from pipelines.core.errors import GateRefused, IntegrityError, TransientError
from pipelines.core.fingerprint import hash_file
from pipelines.registry import history
from pipelines.registry.registry import Registry, list_models, rollback
from pipelines.tracking.config import TrackingConfig


def champion_of(world: Any, model: str = "ingot") -> str:
    """Return the version that the alias names in MLflow."""
    return str(world.client().get_model_version_by_alias(model, "champion").version)


def registered(world: Any) -> list[str]:
    """Return the numbers of all registered versions."""
    return sorted(str(v.version) for v in world.client().search_model_versions("name = 'ingot'"))


def test_the_first_sane_model_becomes_champion(world: Any) -> None:
    summary = world.promote(world.candidate(2.0))
    assert summary["version"] == champion_of(world) == "1"
    version = world.client().get_model_version("ingot", "1")
    assert version.aliases == ["champion"]
    assert version.tags["dvc_hash"] == "0123456789abcdef0123456789abcdef.dir"
    assert version.tags["method"] == "none"
    assert version.tags["validation_status"] == "approved"
    assert {"fingerprint", "digest", "git_commit", "bits", "base"} <= set(version.tags)
    record = history.champion(world.root, "ingot")
    assert record is not None
    assert (record["version"], record["action"], record["why"]) == ("1", "promote", "first champion: nobody to beat")
    assert record["bits_per_byte"] == pytest.approx(summary["bits_per_byte"])
    assert re.fullmatch(r".+@.+", record["who"])


def test_a_better_model_replaces_the_champion_and_a_worse_one_is_refused(world: Any, tmp_path: Path) -> None:
    world.promote(world.candidate(2.0))
    assert world.promote(world.candidate(1.9, seed=1))["version"] == "2"
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(GateRefused, match="bits per byte gained on champion v2") as caught:
        world.promote(world.candidate(1.95, seed=2), out)
    assert caught.value.exit_code == 7
    assert re.search(r"-0\.0[45]\d+ \[.*BROKEN", str(caught.value))
    assert champion_of(world) == "2"
    assert registered(world) == ["1", "2"]
    assert json.loads((out / "decision.json").read_text())["accepted"] is False
    assert history.read(world.root, "ingot")[-1]["action"] == "refused"


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ({"nats": np.full(40, np.nan)}, "finite numbers"),
        ({"bits": 9.0}, "bits per byte"),
        ({"bits": 3.2}, "beats order1"),
    ],
    ids=["NaN", "worse than guessing", "below a baseline"],
)
def test_an_insane_first_model_is_refused_and_leaves_nothing(world: Any, numbers: dict[str, Any], named: str) -> None:
    numbers = {"bits": 2.0} | numbers
    with pytest.raises(GateRefused, match=f"broken: {named}"):
        world.promote(world.candidate(numbers.pop("bits"), **numbers), must_beat=("order1",))
    assert world.client().search_registered_models() == []
    assert history.champion(world.root, "ingot") is None
    assert not list((world.root / "mlartifacts").rglob("*.safetensors"))


def test_a_model_without_evaluation_is_refused(world: Any) -> None:
    inputs = world.candidate(2.0)
    del inputs["evaluation:pretrain"]
    with pytest.raises(GateRefused, match="no evaluation of pretrain"):
        world.promote(inputs)


def test_an_evaluation_of_another_model_is_refused(world: Any) -> None:
    inputs = world.candidate(2.0)
    inputs["model:pretrain"] = world.model("pretrain", seed=9)
    with pytest.raises(GateRefused, match="another model"):
        world.promote(inputs)


def test_a_model_with_another_tokenizer_is_refused(world: Any) -> None:
    inputs = world.candidate(2.0)
    files = inputs["prepare"].manifest.files
    other = files["tokenizer/tokenizer.json"].model_copy(update={"sha256": "0" * 64})
    manifest = inputs["prepare"].manifest.model_copy(update={"files": {**files, "tokenizer/tokenizer.json": other}})
    inputs["prepare"] = type(inputs["prepare"])(inputs["prepare"].path, manifest)
    with pytest.raises(GateRefused, match="wrong tokenizer"):
        world.promote(inputs)


def test_the_smallest_variant_within_budget_is_chosen(world: Any) -> None:
    base = world.model("pretrain")
    pairs = [(base, world.evaluation(base, 2.0, size=1000))]
    for name, bits, size in (("int8", 2.002, 300), ("int4", 2.01, 160), ("int2", 2.4, 90)):
        variant = world.model(name, base=base)
        pairs.append((variant, world.evaluation(variant, bits, size=size)))
    summary = world.promote(world.inputs(*pairs))
    assert (summary["candidate"], summary["size_bytes"]) == ("int4", 160)
    version = world.client().get_model_version("ingot", "1")
    assert (version.tags["method"], version.tags["bits"]) == ("rtn", "8.5")
    assert version.tags["base"] == base.manifest.fingerprint


def test_a_variant_may_replace_its_base_within_budget_but_no_stranger(world: Any) -> None:
    base = world.model("pretrain")
    measured = world.evaluation(base, 2.0, size=1000)
    world.promote(world.inputs((base, measured)))
    variant = world.model("int8", base=base)
    inputs = world.inputs((base, measured), (variant, world.evaluation(variant, 2.01, size=300)))
    assert world.promote(inputs)["rule"] == "smaller variant within budget of the champion's own model"
    stranger = world.model("pretrain", seed=5)
    cousin = world.model("int8", base=stranger, seed=5)
    pairs = [(stranger, world.evaluation(stranger, 2.02)), (cousin, world.evaluation(cousin, 2.021, size=300))]
    with pytest.raises(GateRefused, match="broken: bits per byte gained on champion"):
        world.promote(world.inputs(*pairs))
    assert champion_of(world) == "2"


def test_other_children_are_registered_when_asked(world: Any) -> None:
    base = world.model("pretrain")
    pairs = [(base, world.evaluation(base, 2.0, size=1000))]
    for name, size in (("int8", 300), ("int4", 160)):
        variant = world.model(name, base=base)
        pairs.append((variant, world.evaluation(variant, 2.001, size=size)))
    world.promote(world.inputs(*pairs), register_variants=True)
    rows = list_models(world.root)
    assert {(row["tags"]["size_bytes"], tuple(row["aliases"])) for row in rows} == {("160", ("champion",)), ("300", ())}
    assert history.fingerprints(world.root) == {row["tags"]["fingerprint"] for row in rows}


def test_other_held_out_text_is_no_obstacle_where_it_is_allowed(world: Any) -> None:
    world.promote(world.candidate(2.0))
    other = world.prepared("Something else entirely")
    model = world.model("pretrain", seed=1, prepare=other)
    inputs = world.inputs((model, world.evaluation(model, 7.9, prepare=other)), prepare=other)
    assert world.promote(inputs, allow_new_test_set=True)["rule"].startswith("no comparison with the champion")


def test_promoting_the_champion_again_changes_nothing(world: Any) -> None:
    inputs = world.candidate(2.0)
    world.promote(inputs)
    before = history.read(world.root, "ingot")
    assert world.promote(inputs)["rule"] == "is the champion already"
    assert registered(world) == ["1"]
    assert history.read(world.root, "ingot") == before


def test_rollback_restores_the_previous_champion_again_and_again(world: Any) -> None:
    for number, bits in enumerate((2.0, 1.9, 1.8)):
        world.promote(world.candidate(bits, seed=number))
    assert rollback(world.root, "ingot", why="it swears")["previous"] == "3"
    assert champion_of(world) == "2"
    rollback(world.root, "ingot")
    assert champion_of(world) == "1"
    standing = history.champion(world.root, "ingot")
    assert standing is not None
    assert standing["version"] == "1"
    with pytest.raises(Exception, match="no earlier champion"):
        rollback(world.root, "ingot")
    assert next(r["why"] for r in history.read(world.root, "ingot") if r["action"] == "rollback") == "it swears"


def test_an_alias_moved_by_hand_is_noted_and_respected(world: Any) -> None:
    world.promote(world.candidate(2.0))
    world.promote(world.candidate(1.9, seed=1))
    world.client().set_registered_model_alias("ingot", "champion", "1")
    assert world.promote(world.candidate(1.95, seed=2))["version"] == "3"
    actions = [(r["action"], r["version"]) for r in history.read(world.root, "ingot")]
    assert actions == [("promote", "1"), ("promote", "2"), ("observed", "1"), ("promote", "3")]


def test_bytes_that_come_back_changed_stop_the_promotion(
    world: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world.promote(world.candidate(2.0))
    plan = tmp_path / "faults.json"
    plan.write_text(json.dumps([{"point": "promote.after_fetch", "action": "flip"}]))
    monkeypatch.setenv("INGOT_FAULTS", str(plan))
    better = world.candidate(1.9, seed=1)
    with pytest.raises(IntegrityError, match=r"model\.safetensors came back .* expected sha256"):
        world.promote(better)
    assert champion_of(world) == "1"
    assert registered(world) == ["1"]
    assert world.promote(better)["version"] == champion_of(world)


def test_a_dead_mlflow_refuses_the_promotion_as_pending(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TransientError, match="tracking pending") as caught:
        world.promote(world.candidate(2.0))
    assert caught.value.exit_code == 4
    assert "ingot sync" in str(caught.value)


def test_the_list_shows_a_folder_that_transformers_loads_with_the_artifacts_bytes(world: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    inputs = world.candidate(2.0)
    world.promote(inputs)
    (row,) = list_models(world.root, TrackingConfig(uri=f"sqlite:///{world.root}/mlflow.db"))
    assert (row["name"], row["version"], row["aliases"]) == ("ingot", "1", ["champion"])
    assert row["metrics"]["bits_per_byte"] == pytest.approx(2.0, rel=0.05)
    assert row["metrics"]["accuracy.cloze"] == 0.75
    files = {p.name: hash_file(p) for p in Path(row["path"]).iterdir()}
    wanted = inputs["model:pretrain"].manifest.files
    assert files == {n.removeprefix("model/"): r.sha256 for n, r in wanted.items() if n.startswith("model/")}
    model = AutoModelForCausalLM.from_pretrained(row["path"])
    ids = AutoTokenizer.from_pretrained(row["path"])("the king", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_an_empty_store_lists_no_model_and_makes_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert list_models(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_the_card_has_front_matter_that_parses_and_every_section(world: Any, tmp_path: Path) -> None:
    base = world.model("pretrain")
    variant = world.model("int8", base=base)
    pairs = [(base, world.evaluation(base, 2.0)), (variant, world.evaluation(variant, 2.002, size=300))]
    out = tmp_path / "out"
    out.mkdir()
    world.promote(world.inputs(*pairs), out)
    text = (out / "model_card.md").read_text()
    _, front, page = text.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["license"] == "pdm"
    assert facts["datasets"] == ["shakespeare"]
    assert facts["base_model"].startswith("ingot/pretrain-")
    metrics = facts["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["value"] == pytest.approx(2.0, rel=0.05)
    headings = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert headings == ["Data", "Training", "Evaluation", "Gate", "Limits", "Lineage"]
    assert variant.digest[:16] in page
    assert "| shakespeare | public domain | 50 | 45 |" in page
    assert "0123456789abcdef0123456789abcdef.dir" in page


def test_no_secret_reaches_registry_history_or_card(
    world: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever brings it there: a check's name, the reason of a rollback, the address of the registry."""
    monkeypatch.setenv("SERVICE_PASSWORD", "c4n4ry-Zq81")
    out = tmp_path / "out"
    out.mkdir()
    world.promote(world.candidate(2.0), out)
    world.promote(world.candidate(1.9, seed=1), out)
    with pytest.raises(GateRefused):
        world.promote(world.candidate(1.8, seed=2), out, must_beat=("c4n4ry-Zq81",))
    rollback(world.root, "ingot", why="they said c4n4ry-Zq81")
    assert history.read(world.root)[-1]["why"] == "they said ***"
    elsewhere = Registry(cast("Any", None), "postgresql://me:c4n4ry@db/x", "ingot", world.root)
    assert "tracking_uri" not in elsewhere._note(history.REGISTERED, "9", "within budget", {})
    decided = json.loads((out / "decision.json").read_text())
    assert decided["broken"] == ["beats ***"]
    for path in [*out.iterdir(), world.root / "mlflow.db", world.root / history.HISTORY]:
        assert b"c4n4ry" not in path.read_bytes(), path
