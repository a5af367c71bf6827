"""Methods of kind "training": a variant that is trained on the engine of the pretrain stage, beside its baselines.

The ranks work in the scratch folder, so a killed compression goes on where it was, and a finished baseline is not made
again. What comes back from them are the trained parameters; the method packs them here, in one process.

    scratch/train/       see `pipelines.training.worker_spec`
    scratch/plain/       the trained variant as a dense model folder
    scratch/baselines/   one compression for each baseline
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.architectures.config import Shape
from models.compression import registry
from models.compression.base import Packed, relative_error
from models.compression.training_method import TrainedConfig
from pipelines.compression import baselines, qat_objective, sequential, streaming, writer
from pipelines.compression.baselines import Contender
from pipelines.compression.config import CompressConfig
from pipelines.compression.qat_objective import QatSettings
from pipelines.compression.report import FILE, Comparison, CompressionReport, PackedLayer, TrainingFacts, WeightErrors
from pipelines.compression.run import CompressionRun
from pipelines.core.artifact import read_json
from pipelines.core.errors import ConfigError
from pipelines.core.stage import Progress, StageContext
from pipelines.modelio import folder, layout, meta_init
from pipelines.modelio.folder import WeightReader, WeightWriter
from pipelines.training import stage as training
from pipelines.training.config import PretrainConfig
from pipelines.training.worker_spec import WorkerSpec


def compress(run: CompressionRun) -> CompressionReport:
    """Train a variant of the base model, taught by `inputs["teacher"]` where there is one.

    Writes, besides the variant, the `training.json` and `metrics.jsonl` of its training.

    Raises:
        ConfigError: the method does not fit the model.
        Preempted, NumericError, TransientError, IntegrityError: as the ranks ended.
    """
    run.refuse_rounded_inputs()
    spec = make_worker_spec(run)
    if _parameters(run).steps:
        training.train(spec, run.context)
        for path in (spec.facts, spec.metrics):
            shutil.copyfile(path, run.out_dir / path.name)
    report = pack(run, spec)
    return report.model_copy(update={"comparison": _compare(run, report)})


def make_worker_spec(run: CompressionRun) -> WorkerSpec:
    """Return what to tell the ranks.

    Raises:
        ConfigError: the method does not fit the model.
    """
    config, parameters = run.config, _parameters(run)
    teacher = run.inputs.get("teacher", run.inputs["model"]).path / "model"
    settings = QatSettings(
        method=config.method,
        parameters=parameters.model_dump(mode="json"),
        skip=config.skip,
        base=run.source,
        teacher=teacher if parameters.needs_teacher else None,
    )
    try:
        shape = registry.training(config.method).shape(qat_objective.base_shape(run.source), parameters)
        pretrain = training_settings(parameters, shape, config.seed)
    except ValueError as error:
        raise ConfigError(f"{config.method}: {error}") from error
    place = dataclasses.replace(run.context, scratch=run.context.scratch / "train")
    spec = training.make_worker_spec(pretrain, run.inputs["prepare"], place)
    own = {
        "objective": qat_objective.FACTORY,
        "objective_settings": settings.model_dump(mode="json"),
        "export_precision": "fp32",
    }
    return spec.model_copy(update=own)


def _parameters(run: CompressionRun) -> TrainedConfig:
    assert isinstance(run.config.parameters, TrainedConfig)
    return run.config.parameters


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
        | {"samples": False}  # the evaluation samples every variant as it is stored
        | {"lisa": lisa | {"interval": parameters.lisa_interval}, "checkpoint": {"every": parameters.checkpoint_every}}
    )


# ---- from trained parameters to a stored variant ----------------------------------------------------------------


def pack(run: CompressionRun, spec: WorkerSpec) -> CompressionReport:
    """Write the variant that the trained parameters (or, without training, the initial ones) make.

    The same model with dense weights stays in `scratch/plain`.
    """
    method, parameters = registry.training(run.config.method), _parameters(run)
    settings = QatSettings.model_validate(spec.objective_settings)
    model = qat_objective.student(settings, spec.architecture, spec.config.seed)
    if parameters.steps:
        qat_objective.load_trained(model, spec.model)
    packed = method.finish(model, parameters)  # on the CPU, where the student was put together
    plain = run.context.scratch / "plain"
    _write_plain(cast("PreTrainedModel", model), packed, run.source, plain)
    bare, reader = meta_init.build(plain), WeightReader(plain)
    dense = layout.loads_dense(bare, parameters.model_dump(), embeddings=False)
    variant = writer.VariantWriter(bare, reader, run.target, config=run.config, parameters=parameters, dense=dense)
    stored = {name: variant.add(name, layer) for name, layer in packed.items()}
    variant.close()
    rows = {name: _row(run, name, stored.get(name), reader) for name in sequential.targets(bare, ())}
    errors = [row.weight_error for row in rows.values() if row.weight_error is not None]
    stored_as = variant.layout if packed else layout.LAYOUT_DENSE
    return CompressionReport(
        method=run.config.method,
        parameters=parameters.model_dump(mode="json"),
        layout=stored_as,
        loads_with=layout.loads_with(stored_as),
        not_informative=method.not_informative,
        training=TrainingFacts(steps=parameters.steps, seed=spec.config.seed),
        totals=writer.totals(run, rows, embedding_bytes=variant.embedding_bytes),
        errors=WeightErrors(weight=fmean(errors) if errors else None),
        layers=rows,
    )


def _write_plain(model: PreTrainedModel, packed: Mapping[str, Packed], source: Path, plain: Path) -> None:
    """Write the variant with dense weights, as plain transformers has them."""
    shutil.rmtree(plain, ignore_errors=True)
    folder.copy_companions(source, plain)
    model.config.architectures = [type(model).__name__]
    stored = read_json(source / "config.json").get("dtype") or "float32"
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


def _row(run: CompressionRun, name: str, packed: Packed | None, trained: WeightReader) -> PackedLayer:
    """Return the size of a layer, and how far it is from the base's layer, where that has the same shape."""
    weight_OI, original_OI = (reader.dense(f"{name}.weight").to(run.device) for reader in (trained, run.reader))
    bits = 8 * weight_OI.nbytes if packed is None else packed.stored_bits()
    same = original_OI.shape == weight_OI.shape
    return PackedLayer(
        shape=(weight_OI.shape[0], weight_OI.shape[1]),
        stored_bits=bits,
        bits_per_weight=bits / weight_OI.numel(),
        weight_error=relative_error(original_OI, weight_OI) if same else None,
    )


# ---- the variant beside its baselines ---------------------------------------------------------------------------


def _compare(run: CompressionRun, report: CompressionReport) -> Comparison | None:
    """Compare the variant with the baselines of its method; None where there is no text, or none is wanted."""
    documents = run.config.baseline_documents
    text = run.quick_eval(documents, "first") if documents else None
    if text is None:
        return None
    others = _make_baselines(run) if _parameters(run).baselines else {}

    def contenders() -> Iterator[Contender]:
        yield Contender("the base", streaming.base_nats(run, text, "the base"))
        nats_D = streaming.stored_nats(run, text, run.config.method, run.target)
        yield Contender(run.config.method, nats_D, bytes=report.totals.layer_bytes)
        for name, path in others.items():
            nats_D = streaming.stored_nats(run, text, name, path / "model")
            yield Contender(name, nats_D, bytes=CompressionReport.read(path).totals.layer_bytes)

    return baselines.compare(run, text, contenders(), count=1 + len(others))


def _make_baselines(run: CompressionRun) -> dict[str, Path]:
    """Make the baselines that are not there yet; return their folders."""
    config, folders = run.config, {}
    for name, table in registry.training(config.method).baselines(_parameters(run)).items():
        place = run.context.scratch / "baselines" / re.sub(r"\W+", "-", name)
        folders[name] = out = place / "out"
        if (out / FILE).exists():
            continue
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        shared = {
            "name": place.name,
            "seed": config.seed,
            "samples": config.samples,
            "skip": config.skip,
            "baseline_documents": 0,
        }
        baseline = CompressConfig.model_validate(shared | table)
        run.compress(baseline, run.inputs, out, _within(run.context, place / "scratch", name))
    return folders


def _within(context: StageContext, scratch: Path, name: str) -> StageContext:
    """Return the context of a baseline: its own scratch, and reports that MLflow does not take for the variant's."""

    def report(progress: Progress) -> None:
        context.report(dataclasses.replace(progress, message=f"{name}: {progress.message}", metrics={}))

    return dataclasses.replace(context, scratch=scratch, report=report)
