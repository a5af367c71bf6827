"""Methods of kind "training": a child that is trained on the engine of the pretrain stage, beside its null arms.

The ranks work in the scratch folder, so a killed compression goes on where it was, and a finished arm is not made
again. What comes back from them are the trained parameters; the method packs them here, in one process.

    scratch/train/   see `pipelines.training.worker_spec`
    scratch/plain/   the trained child as a dense model folder
    scratch/arms/    one compression for each null arm
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.architectures.config import Shape
from models.compression import registry
from models.compression.base import Packed, relative_error
from models.compression.training_method import TrainedConfig
from pipelines.compression import post_training, qat_objective, quick_eval, sequential, writer
from pipelines.compression.config import CompressConfig
from pipelines.compression.qat_objective import QatSettings
from pipelines.core.artifact import Artifact
from pipelines.core.compute import torch_device
from pipelines.core.errors import ConfigError
from pipelines.core.stage import Progress, StageContext, Summary
from pipelines.modelio import folder, layout, meta_init
from pipelines.modelio.folder import WeightReader, WeightWriter, write_json
from pipelines.modelio.load import load_model
from pipelines.training import stage as training
from pipelines.training.config import PretrainConfig
from pipelines.training.worker_spec import WorkerSpec

_LAYOUT_DENSE = "safetensors"


def run(config: CompressConfig, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> Summary:
    """Train a child of `inputs["model"]` on `inputs["prepare"]`, taught by `inputs["teacher"]` where there is one.

    Writes `model/`, `compression.json` (with `arms`: the child beside its null arms) and, of the training,
    `training.json` and `metrics.jsonl`.

    Raises:
        ConfigError: the method does not fit the model.
        Preempted, NumericError, TransientError, IntegrityError: as the ranks ended.
    """
    parameters = cast("TrainedConfig", config.parameters)
    spec = make_worker_spec(config, inputs, context)
    if parameters.steps:
        training.train(spec, context)
        for path in (spec.facts, spec.metrics):
            shutil.copyfile(path, out_dir / path.name)
    report = pack(config, spec, out_dir / "model", context.scratch / "plain")
    write_json(out_dir / "compression.json", report)
    report |= _arms(config, inputs, out_dir, context)
    write_json(out_dir / "compression.json", report)
    return {key: report[key] for key in ("method", "parameters", "layout", "totals", "errors", "arms")}


def make_worker_spec(config: CompressConfig, inputs: Mapping[str, Artifact], context: StageContext) -> WorkerSpec:
    """Return what to tell the ranks.

    Raises:
        ConfigError: the method does not fit the model.
    """
    parameters = cast("TrainedConfig", config.parameters)
    source = inputs["model"].path / "model"
    teacher = inputs.get("teacher", inputs["model"]).path / "model"
    method = QatSettings(
        method=config.method,
        parameters=parameters.model_dump(mode="json"),
        skip=config.skip,
        base=source,
        teacher=teacher if parameters.needs_teacher else None,
    )
    try:
        shape = method.training_method.shape(qat_objective.base_shape(source), parameters)
        settings = training_settings(parameters, shape, config.seed)
    except ValueError as error:
        raise ConfigError(f"{config.method}: {error}") from error
    place = dataclasses.replace(context, scratch=context.scratch / "train")
    spec = training.make_worker_spec(settings, inputs["prepare"], place)
    own = {
        "objective": qat_objective.FACTORY,
        "objective_settings": method.model_dump(mode="json"),
        "export_precision": "fp32",
    }
    return spec.model_copy(update=own)


def training_settings(parameters: TrainedConfig, shape: Shape, seed: int) -> PretrainConfig:
    """Return the training of a model of `shape` as the method's parameters want it."""
    steps = max(parameters.steps, 1)
    sizes = shape.model_dump(exclude={"family"}, exclude_none=True)
    lisa = {"enabled": parameters.lisa_layers > 0, "layers": max(parameters.lisa_layers, 1)}
    kept = ("engine", "world_size", "zero_stage", "precision", "batch_size", "micro_batch_size")
    return PretrainConfig.model_validate(
        {name: getattr(parameters, name) for name in (*kept, "validate_every", "validation_sequences")}
        | {"family": shape.family, "preset": "0.5m", "model": sizes, "steps": steps, "seed": seed}
        | {"optimizer": {"name": parameters.optimizer, "lr": parameters.lr, "weight_decay": parameters.weight_decay}}
        | {"schedule": {"warmup": min(int(parameters.warmup * steps), steps - 1), "decay": parameters.decay}}
        | {"lisa": lisa | {"interval": parameters.lisa_interval}, "checkpoint": {"every": parameters.checkpoint_every}}
    )


# ---------------------------------------------------------------------------------------------------------------------
# From trained parameters to a stored child


def pack(config: CompressConfig, spec: WorkerSpec, target: Path, plain: Path) -> dict[str, Any]:
    """Write the child that the trained parameters (or, without training, the starting ones) make.

    Args:
        config: the child's configuration.
        spec: its training.
        target: model folder of the child.
        plain: where to keep the same model with dense weights.

    Returns:
        What `compression.json` says of it.
    """
    method = QatSettings.model_validate(spec.objective_settings)
    parameters, source = method.config, method.base
    model = qat_objective.student(method, spec.architecture, spec.config.seed)
    if parameters.steps:
        qat_objective.load_trained(model, spec.model)
    packed: Mapping[str, Packed] = method.training_method.finish(model, parameters)
    _write_plain(cast("PreTrainedModel", model), packed, source, plain)
    bare, reader = meta_init.build(plain), WeightReader(plain)
    dense = layout.loads_dense(bare, parameters.model_dump(), embeddings=False)
    made = writer.ChildFolder(bare, reader, target, config=config, parameters=parameters, dense=dense)
    stored = {name: made.add(name, layer) for name, layer in packed.items()}
    made.close()
    parent = WeightReader(source)
    rows = {name: _row(name, stored.get(name), reader, parent) for name in sequential.targets(bare, ())}
    stored_as = made.layout if packed else _LAYOUT_DENSE
    return {
        "method": config.method,
        "parameters": parameters.model_dump(mode="json"),
        "layout": stored_as,
        "loads_with": "pipelines.modelio.load" if stored_as == layout.LAYOUT_PRIVATE else "transformers",
        "training": {"steps": parameters.steps, "seed": spec.config.seed},
        "not_informative": method.training_method.not_informative,
        "totals": post_training.totals(rows, parent, target, embedding_bytes=made.embedding_bytes),
        "errors": _errors(rows),
        "layers": rows,
    }


def _write_plain(model: PreTrainedModel, packed: Mapping[str, Packed], source: Path, plain: Path) -> None:
    """Write the child with dense weights, as plain transformers has them."""
    shutil.rmtree(plain, ignore_errors=True)
    folder.copy_companions(source, plain)
    model.config.architectures = [type(model).__name__]
    stored = json.loads((source / "config.json").read_text(encoding="utf-8")).get("dtype") or "float32"
    model.config.dtype = getattr(torch, stored)
    model.config.save_pretrained(plain)
    writer = WeightWriter(plain)
    for name, tensor in _plain_parameters(model, packed).items():
        writer.add(name, tensor.to(model.config.dtype))
    writer.close()


def _plain_parameters(model: nn.Module, packed: Mapping[str, Packed]) -> dict[str, Tensor]:
    own = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in packed or name.endswith(".bias")
    }
    return {name: tensor.detach() for name, tensor in own.items()} | {
        f"{name}.weight": layer.dequantize() for name, layer in packed.items()
    }


def _row(name: str, packed: Packed | None, trained: WeightReader, parent: WeightReader) -> dict[str, Any]:
    """Return a layer's row of `compression.json`: its size, and how far it is from the parent's layer."""
    weight_OI = trained.dense(f"{name}.weight")
    bits = 8 * weight_OI.numel() * weight_OI.element_size() if packed is None else packed.stored_bits()
    original_OI = parent.dense(f"{name}.weight")
    row: dict[str, Any] = {"shape": list(weight_OI.shape), "stored_bits": bits}
    row["bits_per_weight"] = bits / weight_OI.numel()
    if original_OI.shape == weight_OI.shape:
        row["weight_error"] = relative_error(original_OI, weight_OI)
    return row


def _errors(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean over layers of the relative distance from the parent's; none where no layer has its shape."""
    found = [row["weight_error"] for row in rows.values() if "weight_error" in row]
    return {"weight": fmean(found)} if found else {}


# ---------------------------------------------------------------------------------------------------------------------
# Null arms


def _arms(
    config: CompressConfig, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext
) -> dict[str, Any]:
    """Return `parent`, `arms` and `arms_measured` of `compression.json`; no arms without validation documents."""
    if not config.arms_documents:
        return {"arms": {}}
    parent, device = inputs["model"].path / "model", torch_device(context.compute)
    bare = meta_init.build(parent)
    text = quick_eval.build(inputs["prepare"].path, config.arms_documents, bare, device, end="first")
    if text is None:
        return {"arms": {}}
    parameters = cast("TrainedConfig", config.parameters)
    made = _made(config, inputs, context) if parameters.baselines else {}
    base = text.nats(load_model(parent).to(device), "the parent")
    rows: dict[str, Any] = {}
    for name, path in {config.method: out_dir, **made}.items():
        nats = text.nats(load_model(path / "model").to(device), name)
        report = json.loads((path / "compression.json").read_text(encoding="utf-8"))
        rows[name] = {**text.against(nats, base), "bytes": report["totals"]["layer_bytes"]}
    measured = {"split": "validation", "documents": text.documents, "scored_tokens": text.scored}
    return {"parent": text.against(base, base), "arms": rows, "arms_measured": measured}


def _made(config: CompressConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Path]:
    """Make the null arms that are not there yet; return their folders."""
    from pipelines.compression import stage

    folders = {}
    for name, table in registry.training(config.method).baselines(config.parameters).items():
        place = context.scratch / "arms" / re.sub(r"\W+", "-", name)
        folders[name] = place / "out"
        if (place / "out" / "compression.json").exists():
            continue
        shutil.rmtree(place / "out", ignore_errors=True)
        (place / "out").mkdir(parents=True)
        shared = {
            "name": place.name,
            "seed": config.seed,
            "samples": config.samples,
            "skip": config.skip,
            "arms_documents": 0,
        }
        arm = CompressConfig.model_validate(shared | table)
        stage.run(arm, inputs, place / "out", _within(context, place / "scratch", name))
    return folders


def _within(context: StageContext, scratch: Path, name: str) -> StageContext:
    """Return the context of an arm: its own scratch folder, and reports that MLflow does not take for the child's."""

    def report(progress: Progress) -> None:
        context.report(dataclasses.replace(progress, message=f"{name}: {progress.message}", metrics={}))

    return dataclasses.replace(context, scratch=scratch, report=report)
