"""A registry and a gate that are not to be fooled: every scenario on a real MLflow database, with models that score."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from flows.commands import list as list_command
from flows.commands import lookup
from flows.commands import run as run_command
from flows.commands import store as store_command
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import ConfigError, GateRefused, IntegrityError
from pipelines.core.stage import StageContext
from pipelines.evaluation import stage as evaluate
from pipelines.evaluation.config import EvaluateConfig
from pipelines.registry import current, history
from pipelines.registry.evidence import EVIDENCE_TAG
from pipelines.registry.registry import list_models, rollback
from pipelines.tracking.config import TrackingConfig
from tests.pipelines.registry.conftest import SETTINGS

NARROW = {"settings": SETTINGS | {"context": 16, "stride": 12}}


def champion_of(world: Any) -> str | None:
    """Return the version that the alias names in MLflow."""
    number = world.client().get_registered_model("ingot").aliases.get("champion")
    return None if number is None else str(number)


def folder_of(world: Any, version: str) -> Path:
    """Return where the registry keeps a version."""
    return Path(unquote(urlsplit(world.client().get_model_version("ingot", version).source).path))


def flip(path: Path) -> None:
    """Change one bit of a file; the folder's hard links keep the bytes they had."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)


def score(world: Any, tmp_path: Path) -> tuple[float, np.ndarray]:
    """Return bits per byte and document nats of the world's model, as the evaluate stage measures them."""
    out, model = tmp_path / "scored", world.model("pretrain", seed=99)
    out.mkdir()
    tables = {"tasks": {"names": []}, "baselines": [], "probes": {"latency": {"enabled": False}}, "batch_tokens": 512}
    context = StageContext(node="evaluate", scratch=tmp_path / "scratch", compute=ComputeConfig(device="cpu"))
    inputs = {"prepare": world.prepare, "model": model}
    summary = evaluate.run(EvaluateConfig.model_validate(tables), inputs, out, context)
    assert json.loads((out / "evaluation.json").read_text())["settings"] | {"documents": "d" * 64} == SETTINGS
    return summary["bits_per_byte"], np.load(out / "document_nats.npy")


def register_by_hand(world: Any, source: Path) -> str:
    """Register a folder as somebody without Ingot does, and make it champion; return its number."""
    client = world.client()
    if not client.search_registered_models():
        client.create_registered_model("ingot")
    version = str(client.create_model_version("ingot", source.as_uri()).version)
    client.set_registered_model_alias("ingot", "champion", version)
    return version


# ---- unequal measurements -----------------------------------------------------------------------------------------


def test_a_champion_measured_at_another_context_is_measured_again_and_not_beaten_by_a_worse_model(
    world: Any, tmp_path: Path
) -> None:
    true, nats = score(world, tmp_path)
    world.promote(world.candidate(true + 0.5, extra=NARROW))
    with pytest.raises(GateRefused, match="bits per byte gained on champion v1") as caught:
        world.promote(world.candidate(0.0, nats=nats * 1.01, seed=1))
    assert "measured at different settings: context 64 and 16" in str(caught.value)
    assert f"{-0.01 * true:.4f} [" in str(caught.value), "the gain on the true number, not on the registered one"
    assert champion_of(world) == "1"
    assert world.promote(world.candidate(0.0, nats=nats * 0.99, seed=2))["version"] == "2"


def test_what_cannot_be_measured_again_is_refused_and_never_compared(world: Any) -> None:
    world.promote(world.candidate(2.0, extra=NARROW))
    shutil.rmtree(folder_of(world, "1") / "model")
    with pytest.raises(IntegrityError, match=r"model/.* came back from the registry as \(missing\)") as caught:
        world.promote(world.candidate(1.9, seed=1))
    assert caught.value.exit_code == 3
    assert champion_of(world) == "1"


def test_other_text_is_measured_on_the_champion_too(world: Any, tmp_path: Path) -> None:
    world.promote(world.candidate(1.0))
    world.prepare = world.prepared("Something else entirely")
    true, nats = score(world, tmp_path)
    assert true > 1.0
    summary = world.promote(world.candidate(0.0, nats=nats * 0.9, seed=1))
    assert summary["rule"] == "beats the champion beyond noise and the minimum effect"


def test_two_documents_crown_nobody(world: Any) -> None:
    with pytest.raises(GateRefused, match="broken: held-out documents") as caught:
        world.promote(world.candidate(2.0, documents=2))
    assert "at least 20 (promote.min_documents)" in str(caught.value)
    assert world.client().search_registered_models() == []
    assert world.promote(world.candidate(2.0, documents=8, seed=1), min_documents=8)["version"] == "1"


def test_a_larger_base_that_is_better_by_nothing_does_not_replace_its_variant(world: Any) -> None:
    base = world.model("pretrain")
    variant = world.model("int8", base=base)
    pairs = [(base, world.evaluation(base, 2.0, size=2800)), (variant, world.evaluation(variant, 2.0003, size=1000))]
    world.promote(world.inputs(*pairs))
    with pytest.raises(GateRefused, match="bits per byte gained on champion v1") as caught:
        world.promote(world.inputs(*pairs), candidate="pretrain")
    assert "0.0003" in str(caught.value)
    assert "0.002 + 0.01 x 1.49 doublings of bytes" in str(caught.value)
    assert world.promote(world.inputs(*pairs), candidate="pretrain", min_effect=0.0, min_gain_per_doubling=0.0)


# ---- champions that others made -----------------------------------------------------------------------------------


def test_a_champion_that_others_registered_is_measured_before_it_is_displaced(
    world: Any, model_folder: Path, tmp_path: Path
) -> None:
    _, nats = score(world, tmp_path)
    assert register_by_hand(world, model_folder) == "1"
    with pytest.raises(GateRefused, match="bits per byte gained on champion v1"):
        world.promote(world.candidate(0.0, nats=nats * 1.01))
    assert champion_of(world) == "1"
    assert world.promote(world.candidate(0.0, nats=nats * 0.99, seed=1))["version"] == champion_of(world) == "2"
    assert [(r["action"], r["version"]) for r in history.champions(world.root, "ingot")] == [
        ("observed", "1"),
        ("promote", "2"),
    ]


def test_a_champion_that_cannot_be_measured_keeps_its_title_until_the_user_says_so(world: Any, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.pkl").write_bytes(b"not for us")
    register_by_hand(world, tmp_path / "theirs")
    with pytest.raises(GateRefused, match="comparable with champion") as caught:
        world.promote(world.candidate(2.0))
    assert "measuring version 1 again failed: it holds no Hugging Face model folder" in str(caught.value)
    assert "promote.allow_new_test_set=true" in str(caught.value)
    assert champion_of(world) == "1"
    assert world.promote(world.candidate(2.0, seed=1), allow_new_test_set=True)["version"] == champion_of(world)


# ---- the alias is the truth ---------------------------------------------------------------------------------------


def test_every_command_says_what_the_alias_says(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = world.candidate(2.0), world.candidate(1.9, seed=1)
    world.promote(first, model_name="ingot-smoke")
    world.promote(second, model_name="ingot-smoke")
    world.client().set_registered_model_alias("ingot-smoke", "champion", "1")
    monkeypatch.setenv("INGOT_STORE", str(world.root))
    run_command.plan("smoke", [f"store.path={world.root}"], None, None, [], as_json=False)
    assert "Champion of ingot-smoke: v1 (2." in capsys.readouterr().out
    list_command.show("champions", as_json=True)
    newest = json.loads(capsys.readouterr().out)[0]
    assert (newest["version"], newest["action"]) == ("1", "observed")
    assert newest["why"].startswith("alias found moved; ")
    list_command.show("models", as_json=True)
    assert {r["version"]: r["aliases"] for r in json.loads(capsys.readouterr().out)} == {"1": ["champion"], "2": []}
    for target in ("champion", "models:/ingot-smoke@champion", "models:/ingot-smoke/1"):
        out = tmp_path / target.replace("/", "-")
        store_command.export(target, str(out), "hf", None, weights_only=False)
        assert "is version 1 of ingot-smoke" in capsys.readouterr().out
        model = first["model:pretrain"]
        assert (out / "model.safetensors").read_bytes() == (model.path / "model" / "model.safetensors").read_bytes()
    assert [r["action"] for r in history.read(world.root, "ingot-smoke")] == ["promote", "promote"], (
        "looking writes not"
    )


def test_a_store_that_promoted_nothing_sees_the_champion_of_a_shared_registry(
    world: Any, second_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = world.candidate(2.0)
    world.promote(model)
    seen = current.champion(TrackingConfig(uri=second_world.tracking.uri), second_world.root, "ingot")
    assert seen is not None
    assert (seen["version"], seen["fingerprint"]) == ("1", model["model:pretrain"].manifest.fingerprint)
    monkeypatch.setenv("INGOT_STORE", str(second_world.root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(second_world.tracking.uri))
    store_command.export("champion", str(tmp_path / "out"), "hf", None, weights_only=False)
    assert "champion is version 1 of ingot" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_deleted_champion_is_no_champion_and_the_rollback_finds_the_one_before(world: Any) -> None:
    for number, bits in enumerate((2.0, 1.9, 1.8)):
        world.promote(world.candidate(bits, seed=number))
    world.client().delete_model_version("ingot", "3")
    world.client().delete_model_version("ingot", "2")
    assert current.champion(TrackingConfig(), world.root, "ingot") is None
    assert rollback(world.root, "ingot")["version"] == champion_of(world) == "1"
    assert history.champions(world.root, "ingot")[-1]["version"] == "1"
    with pytest.raises(ConfigError, match="no earlier champion"):
        rollback(world.root, "ingot")


def test_a_rollback_is_told_by_the_champion_that_the_alias_names(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, bits in enumerate((2.0, 1.9)):
        world.promote(world.candidate(bits, seed=number))
    world.client().set_registered_model_alias("ingot", "champion", "1")
    monkeypatch.setenv("INGOT_STORE", str(world.root))
    fingerprint = str(world.client().get_model_version("ingot", "1").tags["fingerprint"])
    assert lookup.find_registered("ingot/1") == lookup.find_registered(fingerprint) == "ingot"
    with pytest.raises(ConfigError, match="'ingot/2' is champion of no registered model"):
        lookup.find_registered("ingot/2")


def test_a_foreign_champion_is_listed_and_its_export_says_how_to_get_it(
    world: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_by_hand(world, model_folder)
    (row,) = list_models(world.root)
    assert (row["version"], row["aliases"], row["path"]) == ("1", ["champion"], str(model_folder))
    monkeypatch.setenv("INGOT_STORE", str(world.root))
    with pytest.raises(ConfigError, match="was not registered by Ingot"):
        store_command.export("champion", str(tmp_path / "out"), "hf", None, weights_only=False)


# ---- damaged bytes ------------------------------------------------------------------------------------------------


def test_a_rollback_does_not_crown_damaged_weights(world: Any) -> None:
    for number, bits in enumerate((2.0, 1.9, 1.8)):
        world.promote(world.candidate(bits, seed=number))
    flip(folder_of(world, "2") / "model" / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"version 2 .*model\.safetensors came back") as caught:
        rollback(world.root, "ingot")
    assert "delete the version in MLflow" in str(caught.value)
    assert champion_of(world) == "3"
    world.client().delete_model_version("ingot", "2")
    assert rollback(world.root, "ingot")["version"] == champion_of(world) == "1"


def test_a_manifest_that_was_exchanged_with_the_weights_is_found_by_its_digest(world: Any) -> None:
    world.promote(world.candidate(2.0))
    other = world.model("pretrain", seed=7, files={"more.json": b"{}"})
    world.promote(world.candidate(1.9, seed=1))
    place = folder_of(world, "1")
    shutil.rmtree(place / "model")
    shutil.copytree(other.path / "model", place / "model")
    shutil.copyfile(other.path / "manifest.json", place / "ingot" / "manifest.json")
    with pytest.raises(IntegrityError, match="its manifest has the digest"):
        rollback(world.root, "ingot")
    assert champion_of(world) == "2"


@pytest.mark.parametrize("name", ["evidence.json", "document_nats.npy"])
def test_damaged_evidence_decides_nothing_until_the_model_is_measured_again(
    world: Any, tmp_path: Path, name: str
) -> None:
    _, nats = score(world, tmp_path)
    world.promote(world.candidate(0.0, nats=nats))
    flip(folder_of(world, "1") / "ingot" / name)
    worse = world.candidate(0.0, nats=nats * 1.01, seed=1)
    with pytest.raises(IntegrityError, match="the evidence of version 1 is damaged") as caught:
        world.promote(worse)
    assert (caught.value.exit_code, champion_of(world)) == (3, "1")
    assert EVIDENCE_TAG in str(caught.value)
    world.client().delete_model_version_tag("ingot", "1", EVIDENCE_TAG)
    with pytest.raises(GateRefused, match="bits per byte gained on champion v1"):
        world.promote(worse)
    assert world.promote(world.candidate(0.0, nats=nats * 0.99, seed=2))["version"] == champion_of(world) == "2"


def test_evidence_that_is_gone_is_damage(world: Any) -> None:
    world.promote(world.candidate(2.0))
    shutil.rmtree(folder_of(world, "1") / "ingot")
    with pytest.raises(IntegrityError, match="is not there"):
        world.promote(world.candidate(1.9, seed=1))
    assert champion_of(world) == "1"
