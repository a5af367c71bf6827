"""Tuning of a registered model, from `models:/ingot@champion` to the tuned artifact, by LAMB and by LISA."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.architectures.build import build
from models.optim import lisa
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.run_stage import materialize
from pipelines.core.stage import Progress, StageContext
from pipelines.core.store import LocalStore
from pipelines.registry import initial_weights
from pipelines.registry.config import FetchConfig
from pipelines.stages import STAGES
from pipelines.tracking.config import TrackingConfig
from pipelines.training import model_export
from pipelines.training.checkpoint_io import MASTER, Reader
from pipelines.training.config import PretrainConfig

LAYERS, STEPS = 3, 4
RULES: dict[str, dict[str, Any]] = {
    "lamb": {"optimizer": {"name": "lamb", "lr": 0.02}},
    "lisa": {"optimizer": {"name": "lamb", "lr": 0.02}, "lisa": {"enabled": True, "layers": 1, "interval": STEPS}},
}


@pytest.fixture
def settings(tiny_settings: dict[str, Any]) -> Callable[[str], PretrainConfig]:
    """Return the settings of a tuning; looking for spikes makes it keep a checkpoint of step 0."""
    common = {
        "engine": "plain",
        "world_size": 1,
        "zero_stage": 0,
        "steps": STEPS,
        "monitors": {"loss_spikes": {"factor": 50.0}},
    }
    return lambda rule: PretrainConfig.model_validate(
        {**tiny_settings, **common, "checkpoint": {"every": STEPS, "keep": 3}, **RULES[rule]}
    )


@pytest.fixture
def world(
    world_of: Callable[[Path], Any], settings: Callable[[str], PretrainConfig], prepared: Artifact, tmp_path: Path
) -> Any:
    """A store whose MLflow has two versions of `ingot`, for the tokens of `prepared`; the second is champion."""
    architecture = settings("lamb").architecture(prepared.read_json("index.json"))
    for seed in (1, 2):
        weights = {name: tensor.data for name, tensor in build(architecture, seed=seed).named_parameters()}
        model_export.write_model(tmp_path / f"model{seed}", architecture, weights, "fp32")
        model_export.copy_tokenizer(prepared.path, tmp_path / f"model{seed}")
    world = world_of(tmp_path / "model1")
    world.promote(world.candidate(2.0, seed=1))
    world.model_folder = tmp_path / "model2"
    world.promote(world.candidate(1.5, seed=2))
    return world


class Copying:
    """Copies the checkpoint of step 0 away as soon as training reports; the scratch folder goes at the end."""

    def __init__(self, scratch: Path, target: Path) -> None:
        self._scratch, self.target = scratch, target

    def __call__(self, _progress: Progress) -> None:
        found = sorted(self._scratch.glob("pretrain-*/checkpoints/step-00000000"))
        if found and not self.target.exists():
            shutil.copytree(found[0], self.target)

    def weights(self, shapes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with Reader(sorted(self.target.glob("*.safetensors"))) as reader:
            return {name: reader.read(f"model.{name}", MASTER, 0, t.numel()).view_as(t) for name, t in shapes.items()}


def made(store: LocalStore, name: str, config: Any, inputs: dict[str, Artifact], **context: Any) -> Artifact:
    keys = {key: used.manifest.fingerprint for key, used in inputs.items()}
    at_work = StageContext(name, store.root, store=store.root, compute=ComputeConfig(device="cpu"), **context)
    return materialize(STAGES[name], config, inputs, store, at_work, input_keys=keys, data_hash=None)


@pytest.mark.parametrize("rule", RULES)
def test_tuning_starts_from_the_bytes_of_the_champion_and_records_where_they_came_from(
    rule: str,
    settings: Callable[[str], PretrainConfig],
    world: Any,
    prepared: Artifact,
    tmp_path: Path,
) -> None:
    store, champion = (
        LocalStore(world.root),
        initial_weights.resolve("models:/ingot@champion", TrackingConfig(), world.root, world.root),
    )
    order = FetchConfig(place=champion.place, weights=champion.weights, origin=champion.origin)
    fetched = made(store, "fetch", order, {})
    registered = load_file(tmp_path / "model2" / "model.safetensors")
    copying = Copying(store.root / "scratch", tmp_path / "step0")
    tuned = made(store, "pretrain", settings(rule), {"prepare": prepared, "init_weights": fetched}, report=copying)

    started = copying.weights(registered)
    assert all(torch.equal(started[name], registered[name]) for name in registered)
    ended = load_file(tuned.path / "model" / "model.safetensors")
    drawn = lisa.draw(0, 0, LAYERS, 1) if rule == "lisa" else tuple(range(LAYERS))
    for name, before in registered.items():
        layer = lisa.layer_of(name)
        assert torch.equal(ended[name], before) == (layer is not None and layer not in drawn), name

    assert tuned.manifest.parents == {"prepare": prepared.digest, "init_weights": fetched.digest}
    assert tuned.manifest.identity["inputs"]["init_weights"] == fetched.manifest.fingerprint
    assert tuned.manifest.summary["init_from"] == "models:/ingot/2"
    assert tuned.manifest.summary["init_weights"] == initial_weights.folder_digest(tmp_path / "model2")
    origin = fetched.manifest.summary["origin"]
    assert [a.manifest.identity["seed"] for a in store.artifacts() if a.manifest.fingerprint == origin] == [2]
