"""Training from given weights: they are what step one starts from, and a model that does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.architectures.build import build
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.training import init_weights, model_export
from pipelines.training.worker_spec import WorkerSpec

Run = Callable[..., int]
MakeSpec = Callable[..., WorkerSpec]
FAMILIES = ["decoder", "encoder"]


@pytest.fixture
def written(plain_spec: MakeSpec, prepared: Artifact, tmp_path: Path) -> Callable[[str], Path]:
    """The model folder of a family, as a run leaves it, with weights of their own."""

    def make(family: str) -> Path:
        spec = plain_spec(tmp_path / "order", family=family)
        architecture = spec.config.architecture(spec.index)
        weights = {name: tensor.data for name, tensor in build(architecture, seed=5).named_parameters()}
        model_export.write_model(tmp_path / family, architecture, weights, "fp32")
        model_export.copy_tokenizer(prepared.path, tmp_path / family)
        return tmp_path / family

    return make


@pytest.fixture
def run_from(plain_spec: MakeSpec, run_plain: Run) -> Callable[..., Path]:
    """Run a plain pretraining from the weights of a folder; the call that makes process settings is `run_plain`'s."""
    from pipelines.training import worker

    def call(folder: Path, source: Path, **changes: Any) -> Path:
        spec = plain_spec(folder, **changes).model_copy(update={"init_weights": source})
        (folder / "worker_spec.json").write_text(spec.model_dump_json())
        assert worker.main([str(folder / "worker_spec.json")]) == 0
        return folder

    return call


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_almost_no_rate_keeps_the_weights_it_started_from(
    family: str, written: Callable[[str], Path], run_from: Callable[..., Path], tmp_path: Path
) -> None:
    source = written(family)
    tuned = run_from(tmp_path / "tuned", source, family=family, steps=3, optimizer={"lr": 1e-12})
    before, after = load_file(source / "model.safetensors"), weights(tuned)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-8) for name in before)


def test_tuning_by_lamb_and_by_lisa_goes_on_where_training_ended(
    run_plain: Run, run_from: Callable[..., Path], tmp_path: Path
) -> None:
    whole: dict[str, Any] = {"validation_sequences": 100, "validate_every": 100, "checkpoint": {"every": 100}}
    tuning = {**whole, "steps": 8, "schedule": {"warmup": 0}}
    assert run_plain(tmp_path / "base", steps=30, optimizer={"lr": 0.05}, **whole) == 0
    assert run_plain(tmp_path / "fresh", **tuning) == 0
    base, fresh = (facts(tmp_path / name)["validation_loss"] for name in ("base", "fresh"))
    rules: list[dict[str, Any]] = [
        {"optimizer": {"name": "lamb", "lr": 0.01}},
        {"optimizer": {"name": "adamw", "lr": 3e-3}, "lisa": {"enabled": True, "layers": 1, "interval": 2}},
    ]
    for number, rule in enumerate(rules):
        tuned = facts(run_from(tmp_path / str(number), tmp_path / "base" / "model", **tuning, **rule))
        assert tuned["validation_loss"] < base < fresh


def test_lisa_leaves_every_byte_of_the_layers_that_it_never_drew(
    written: Callable[[str], Path], run_from: Callable[..., Path], tmp_path: Path
) -> None:
    from models.optim import lisa

    source = written("decoder")
    tuned = run_from(tmp_path / "tuned", source, steps=4, lisa={"enabled": True, "layers": 1, "interval": 4})
    drawn = lisa.draw(0, 0, 3, 1)
    before, after = load_file(source / "model.safetensors"), weights(tuned)
    for name in before:
        layer = lisa.layer_of(name)
        assert torch.equal(before[name], after[name]) == (layer is not None and layer not in drawn), name


def test_a_resumed_tuning_ends_with_the_same_bytes(
    written: Callable[[str], Path], run_from: Callable[..., Path], tmp_path: Path
) -> None:
    source = written("decoder")
    settings: dict[str, Any] = {"lisa": {"enabled": True, "layers": 1, "interval": 2}, "schedule": {"warmup": 1}}
    whole = run_from(tmp_path / "whole", source, **settings)
    resumed = run_from(tmp_path / "resumed", source, **settings)
    shutil.rmtree(resumed / "model")
    (resumed / "training.json").unlink()
    newest = max((resumed / "checkpoints").glob("step-*"))
    shutil.rmtree(newest)  # as after a kill between the last two checkpoints
    run_from(tmp_path / "resumed", source, **settings)
    assert (resumed / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()
    assert facts(resumed)["losses"] == facts(whole)["losses"]


def test_half_precision_weights_start_a_run_in_full_precision(
    written: Callable[[str], Path], plain_spec: MakeSpec, tmp_path: Path
) -> None:
    source = written("decoder")
    halves = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(halves, source / "model.safetensors")
    spec = plain_spec(tmp_path / "spec")
    model = build(spec.config.architecture(spec.index), seed=0)
    init_weights.load(model, source)
    loaded = dict(model.named_parameters())
    assert all(loaded[name].dtype == torch.float32 for name in halves)
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in halves.items())


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checked(plain_spec: MakeSpec, prepared: Artifact, tmp_path: Path) -> Callable[..., None]:
    """Check a folder against tiny settings with these changes."""

    def call(folder: Path, **changes: Any) -> None:
        spec = plain_spec(tmp_path / "spec", **changes)
        init_weights.check(spec.config.architecture(spec.index), folder, prepared.path / "tokenizer")

    return call


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_the_same_settings_fits(
    family: str, written: Callable[[str], Path], checked: Callable[..., None]
) -> None:
    checked(written(family), family=family)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"width": 64}, "hidden_size is 32, this run's is 64"),
        ({"layers": 2}, "num_hidden_layers is 3, this run's is 2"),
        ({"rope_theta": 500.0}, "rope_parameters"),
        ({"norm_eps": 1e-3}, "rms_norm_eps"),
        ({"tie_embeddings": False}, "tie_word_embeddings is True"),
    ],
)
def test_another_shape_is_refused_by_name(
    model: dict[str, Any], message: str, written: Callable[[str], Path], checked: Callable[..., None]
) -> None:
    tiny = {"width": 32, "layers": 3, "heads": 2, "ffn_width": 44}
    with pytest.raises(ConfigError, match=message):
        checked(written("decoder"), model={**tiny, **model})


def test_the_other_family_is_refused(written: Callable[[str], Path], checked: Callable[..., None]) -> None:
    with pytest.raises(ConfigError, match="model_type is 'llama', this run's is 'modernbert'"):
        checked(written("decoder"), family="encoder")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update(extra=torch.ones(2)), "extra has no place here"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"has the shape \[7\], \[32\] is needed"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    damage: Callable[[dict[str, torch.Tensor]], Any],
    message: str,
    written: Callable[[str], Path],
    checked: Callable[..., None],
) -> None:
    folder = written("decoder")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        checked(folder)


def test_a_tokenizer_with_other_ids_is_refused_by_token(
    written: Callable[[str], Path], checked: Callable[..., None]
) -> None:
    folder = written("decoder")
    known = json.loads((folder / "tokenizer.json").read_text())
    words = known["model"]["vocab"]
    words["w10"], words["w11"] = words["w11"], words["w10"]
    (folder / "tokenizer.json").write_text(json.dumps(known))
    with pytest.raises(ConfigError, match="'w10' is 11 there and 10 here"):
        checked(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="its tokens cannot be compared"):
        checked(folder)
