"""Weights to start from: what a name resolves to, whose bytes count, and that they arrive as they were promoted."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.compression import registry
from models.compression.base import Statistics
from pipelines.core.errors import ConfigError, IntegrityError, NumericError
from pipelines.core.stage import StageContext
from pipelines.registry import fetch, initial_weights
from pipelines.registry.config import FetchConfig
from pipelines.registry.initial_weights import Source
from pipelines.stages import STAGES
from pipelines.tracking.config import TrackingConfig

Resolve = Callable[[str], Source]


@pytest.fixture
def promoted(world: Any) -> Any:
    """A store with two versions of `ingot`: the second is champion."""
    world.promote(world.candidate(2.0))
    world.promote(world.candidate(1.5, seed=1))
    return world


@pytest.fixture
def resolve(store_root: Path) -> Resolve:
    return lambda wanted: initial_weights.resolve(wanted, TrackingConfig(), store_root, store_root)


def fetched(found: Source, store_root: Path, out: Path) -> tuple[Path, dict[str, Any]]:
    """Run the fetch stage; return the model folder and the summary."""
    out.mkdir(parents=True, exist_ok=True)
    config = FetchConfig(place=found.place, weights=found.weights, origin=found.origin)
    summary = fetch.run(config, {}, out, StageContext("fetch", out, store=store_root))
    return out / "model", summary


def test_an_alias_resolves_to_the_version_that_it_names_now(promoted: Any, resolve: Resolve) -> None:
    champion = resolve("models:/ingot@champion")
    assert champion.place == "models:/ingot/2"
    assert "is version 2" in champion.note
    promoted.client().set_registered_model_alias("ingot", "champion", "1")
    assert resolve("models:/ingot@champion").place == "models:/ingot/1"


def test_alias_version_artifact_and_folder_of_one_model_have_one_identity(
    promoted: Any, resolve: Resolve, store_root: Path
) -> None:
    found = resolve("models:/ingot@champion")
    artifacts = {a.manifest.fingerprint: a for a in promoted_models(store_root)}
    made = artifacts[found.origin]
    ways = [found, resolve("models:/ingot/2"), resolve(str(made.path)), resolve(str(made.path / "model"))]
    assert len({way.weights for way in ways}) == 1
    identities = {str(STAGES["fetch"].identity(FetchConfig(place=w.place, weights=w.weights), {})) for w in ways}
    assert len(identities) == 1


def promoted_models(store_root: Path) -> list[Any]:
    from pipelines.core.store import LocalStore

    return [a for a in LocalStore(store_root).artifacts() if a.manifest.stage == "pretrain"]


def test_other_weights_are_another_identity(resolve: Resolve, model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    before = resolve(str(tmp_path / "model")).weights
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert resolve(str(tmp_path / "model")).weights != before


def test_a_registered_model_is_fetched_byte_for_byte(
    promoted: Any, resolve: Resolve, model_folder: Path, store_root: Path, tmp_path: Path
) -> None:
    found = resolve("models:/ingot@champion")
    folder, summary = fetched(found, store_root, tmp_path / "out")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (model_folder / name).read_bytes()
    assert summary["source"] == "models:/ingot/2"
    assert summary["origin"] == found.origin
    assert summary["weights"] == initial_weights.folder_digest(folder)
    assert summary["dequantized"] is False
    assert not list((store_root / "scratch").glob("fetched-*"))


def test_weights_that_changed_after_the_plan_are_refused(
    resolve: Resolve, model_folder: Path, store_root: Path, tmp_path: Path
) -> None:
    found = dataclasses.replace(resolve(str(model_folder)), weights="0" * 64)
    with pytest.raises(IntegrityError, match="the plan was made for 0000000000000000"):
        fetched(found, store_root, tmp_path / "out")


def test_a_folder_with_a_weight_that_is_not_finite_is_refused_by_its_own_name(
    resolve: Resolve, model_folder: Path, store_root: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(model_folder, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError, match=r"broken/model\.safetensors: the weight model\.norm\.weight has 1 of"):
        fetched(resolve(str(broken)), store_root, tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


def test_a_compressed_model_starts_from_the_weights_that_it_computes_with(
    resolve: Resolve, model_folder: Path, store_root: Path, tmp_path: Path
) -> None:
    from pipelines.modelio.folder import RECORD

    packed = quantized(model_folder, tmp_path / "packed")
    folder, summary = fetched(resolve(str(packed)), store_root, tmp_path / "out")
    assert summary["dequantized"] is True
    assert not (folder / RECORD).exists()
    assert "quantization_config" not in (folder / "config.json").read_text()
    dense, original = load_file(folder / "model.safetensors"), load_file(model_folder / "model.safetensors")
    assert dense.keys() == original.keys()
    assert all(tensor.dtype == torch.float32 for tensor in dense.values())
    name = "model.layers.0.mlp.up_proj.weight"
    packed_weight = registry.weight("rtn").compress(original[name], Statistics(), registry.get("rtn").Config(bits=8))
    assert not torch.equal(dense[name], original[name])
    assert torch.equal(dense[name], packed_weight.dequantize())
    rest = [other for other in original if not other.endswith("up_proj.weight")]
    assert all(torch.equal(dense[other], original[other]) for other in rest)


def quantized(model: Path, target: Path) -> Path:
    """Write the model with one layer rounded to 8 bits, in the layout of the compress stage."""
    from pipelines.modelio import folder as layout

    method = registry.weight("rtn")
    config = method.Config.model_validate({"bits": 8})
    layout.copy_companions(model, target)
    config_json = target / "config.json"
    config_json.write_text(config_json.read_text().replace("{", '{"quantization_config": {"bits": 8},', 1))
    writer = layout.WeightWriter(target)
    layers = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if name.endswith("up_proj.weight"):
            module = name.removesuffix(".weight")
            layers[module] = {"method": "rtn", "config": config.model_dump()}
            packed = method.compress(tensor, Statistics(), config)
            for leaf, part in packed.tensors().items():
                writer.add(f"{module}.{leaf}", part)
        else:
            writer.add(name, tensor)
    writer.close()
    layout.write_json(target / layout.RECORD, {"format": layout.RECORD_FORMAT, "layers": layers})
    return target


@pytest.mark.parametrize("wanted", ["models:/ingot@nobody", "models:/ingot/7", "models:/other@champion"])
def test_a_model_that_is_not_registered_is_a_clear_error(wanted: str, promoted: Any, resolve: Resolve) -> None:
    with pytest.raises(ConfigError, match="no such model, version or alias"):
        resolve(wanted)


def test_a_version_that_others_registered_is_refused_with_a_way_out(world: Any, resolve: Resolve) -> None:
    client = world.client()
    client.create_registered_model("foreign")
    (world.root / "empty").mkdir()
    client.create_model_version("foreign", (world.root / "empty").as_uri())
    with pytest.raises(ConfigError, match="was not registered by Ingot"):
        resolve("models:/foreign/1")


def test_a_folder_without_model_or_with_pickled_weights_is_refused(resolve: Resolve, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no model folder"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytest_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="no safetensors weights"):
        resolve(str(tmp_path))


def test_without_a_registry_nothing_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="there is no model registry"):
        initial_weights.resolve("models:/ingot@champion", TrackingConfig(), tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []
