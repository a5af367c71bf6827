"""Methods of kind "weight": a model walked block by block, stored packed, reported beside its null arms."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel

from models.compression import registry
from models.compression.base import MethodConfig
from pipelines.compression import (
    baselines,
    bit_allocation,
    calibration,
    layer_selection,
    sensitivity,
    sequential,
    writer,
)
from pipelines.compression.config import CompressConfig
from pipelines.core.artifact import Artifact
from pipelines.core.compute import torch_device
from pipelines.core.errors import ConfigError
from pipelines.core.stage import Progress, StageContext, Summary
from pipelines.modelio import layout, meta_init
from pipelines.modelio.folder import WeightReader, write_json


def run(config: CompressConfig, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> Summary:
    """Compress `inputs["model"]`, calibrated on `inputs["prepare"]`.

    Writes `model/` (a transformers folder) and `compression.json`: method, parameters, layout, errors of every layer
    beside those of its null arms, the bytes of the compressed layers and of the whole, parent and child, and `arms`:
    the child beside other methods of its size on validation text.

    Raises:
        ConfigError: the method does not fit a layer, which is named, or the parent cannot be compressed again.
        NumericError: calibration met activations that are not finite.
    """
    method, prepare = registry.weight(config.method), inputs["prepare"].path
    source, target = inputs["model"].path / "model", out_dir / "model"
    model, reader = meta_init.build(source), WeightReader(source)
    refuse_rounded_inputs(config.method, reader)
    names = sequential.targets(model, config.skip)
    dense = layout.loads_dense(model, config.parameters.model_dump(), embeddings=config.embeddings == "quantize")
    parameters = config.parameters.fitted(_widths(model, reader, names, config)) if dense else config.parameters
    shown = _shown(config, parameters, prepare, model, reader, names, context)
    rows_shown = calibration.ROWS if method.needs(parameters).inputs else 0
    walker = sequential.Walker(
        model,
        reader,
        torch_device(context.compute),
        tokens_NT=shown.tokens_NT if shown else None,
        rows=rows_shown,
        fisher=shown.fisher if shown else None,
    )
    parameters, names, choice = layer_selection.decide(config, walker, method, parameters, names, prepare)
    planned = bit_allocation.make(model, reader, method, parameters, names=names, shown=shown)
    # Readers that unpack while loading apply one scheme to all layers.
    private = dense and bool(planned.parameters)
    folder = writer.ChildFolder(
        model, reader, target, config=config, parameters=parameters, dense=dense and not private, private=private
    )
    rows: dict[str, dict[str, Any]] = {}
    for done, block in enumerate(walker.walk(method, parameters, names, planned.parameters), start=1):
        for name, layer in block.items():
            stored = folder.add(name, layer.packed, planned.parameters.get(name))
            rows[name] = layer.report(stored.stored_bits())
        context.report(Progress(context.node, done, model.config.num_hidden_layers, "blocks"))
    folder.close()
    report = {
        "method": config.method,
        "parameters": parameters.model_dump(mode="json"),
        "layout": folder.layout,
        "loads_with": "transformers" if folder.layout == layout.LAYOUT_PUBLIC else "pipelines.modelio.load",
        "calibration": {"sequences": len(shown.tokens_NT) if shown else 0, "seed": config.seed},
        "not_informative": method.not_informative,
        "totals": totals(rows, reader, target, embedding_bytes=folder.embedding_bytes),
        "errors": _errors(rows),
        "layers": rows,
    }
    report |= choice | ({"allocation": dict(planned.report)} if planned.report else {})
    maker = baselines.Arm(config.method, method, parameters, planned.parameters)
    report |= baselines.measure(config, walker, list(rows), maker, planned.nulls, target, prepare, context)
    if shown and shown.fisher:
        shutil.rmtree(shown.fisher)
    write_json(out_dir / "compression.json", report)
    return {key: report[key] for key in ("method", "parameters", "layout", "totals", "errors", "arms")}


def refuse_rounded_inputs(method: str, reader: WeightReader) -> None:
    """Refuse a parent whose layers round their inputs: its weights alone are not what it computes.

    Raises:
        ConfigError: naming the first such layer.
    """
    for name in reader.modules():
        if reader.packed(name).rounds_inputs:
            raise ConfigError(
                f"{method} cannot start from this parent: {name} rounds its inputs, which another method would forget",
                hint="quantize inputs last: start from the parent of that child",
            )


def _shown(
    config: CompressConfig,
    parameters: MethodConfig,
    prepare: Path,
    model: PreTrainedModel,
    reader: WeightReader,
    names: list[str],
    context: StageContext,
) -> bit_allocation.Shown | None:
    """Return what calibration shows; None for methods that need none. Squared gradients are recorded here."""
    needs = registry.weight(config.method).needs(parameters)
    if not needs.sequences:
        return None
    device, masked = torch_device(context.compute), meta_init.is_encoder(model)
    tokens_NT = calibration.sample_tokens(prepare, samples=config.samples, seed=config.seed, masked=masked)
    labels_NT = calibration.labels(prepare, tokens_NT, seed=config.seed, masked=masked)
    if not needs.gradients:
        return bit_allocation.Shown(tokens_NT, labels_NT, device, config.seed)
    fisher = context.scratch / "fisher"
    sensitivity.record(model, reader, names, tokens_NT, labels_NT, folder=fisher, device=device)
    return bit_allocation.Shown(tokens_NT, labels_NT, device, config.seed, fisher)


def totals(
    rows: Mapping[str, Mapping[str, Any]], reader: WeightReader, target: Path, *, embedding_bytes: int
) -> dict[str, Any]:
    """Return bits and bytes: of the compressed layers, and of all weight files."""
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows.values())
    stored = sum(row["stored_bits"] for row in rows.values())
    dense = sum(_dense_bytes(reader, name) for name in rows)
    files = WeightReader(target).bytes
    return {
        "layers": len(rows),
        "weights": weights,
        "stored_bits": stored,
        "bits_per_weight": stored / weights,
        "layer_bytes": stored // 8,
        "parent_layer_bytes": dense,
        "layer_ratio": 8 * dense / stored,
        "embedding_bytes": embedding_bytes,
        "bytes": files,
        "parent_bytes": reader.bytes,
        "ratio": reader.bytes / files,
    }


def _errors(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means over layers of the relative errors, null arms included."""
    errors: dict[str, Any] = {"weight": fmean(row["weight_error"] for row in rows.values())}
    measured = [row for row in rows.values() if "output_error" in row]
    if measured:
        errors["output"] = fmean(row["output_error"] for row in measured)
        errors["null"] = {arm: fmean(row["null"][arm] for row in measured) for arm in sorted(measured[0]["null"])}
    return errors


def _dense_bytes(reader: WeightReader, name: str) -> int:
    tensor = reader.dense(f"{name}.weight")
    return tensor.numel() * tensor.element_size()


def _widths(model: PreTrainedModel, reader: WeightReader, names: list[str], config: CompressConfig) -> list[int]:
    """Return the input widths of everything that will be packed."""
    matrices = writer.token_matrices(model, reader) if config.embeddings == "quantize" else []
    return sorted({int(model.get_parameter(f"{name}.weight").shape[1]) for name in [*names, *matrices]})
