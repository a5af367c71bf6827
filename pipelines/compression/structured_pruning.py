"""Methods of kind "structure": attention groups and feed-forward neurons cut out of every layer.

The variant is a smaller model that plain transformers loads: fewer heads, a smaller `intermediate_size`. Public
configurations have one number of each for all layers, so every layer loses equally many; which ones is the method's
choice. Nothing is trained here; a distilled variant `from` this one recovers more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.compression import registry
from models.compression.solvers import structured
from models.compression.solvers.structured import Structure, StructureConfig
from pipelines.compression import baselines, calibration
from pipelines.compression.baselines import Contender
from pipelines.compression.masked_model import MaskedTransformer, Unit
from pipelines.compression.report import CalibrationFacts, Comparison, CompressionReport, CutLayer, Totals
from pipelines.compression.run import CompressionRun
from pipelines.core.artifact import read_json
from pipelines.core.errors import ConfigError
from pipelines.modelio import folder, layout, meta_init
from pipelines.modelio.folder import WeightReader, WeightWriter, write_json


def compress(run: CompressionRun) -> CompressionReport:
    """Cut units out of the base model, chosen on training sequences.

    Raises:
        ConfigError: the model type has no such units, or the shares round to none; the method is named.
        NumericError: a model gives numbers that are not finite.
    """
    run.refuse_rounded_inputs()
    config, method, parameters = run.config, registry.structure(run.config.method), run.config.parameters
    assert isinstance(parameters, StructureConfig)
    masked = MaskedTransformer(run.load_base(), run.tokens_NT, run.labels_NT, **calibration.boundaries(run.prepare))
    check(config.method, masked, parameters)
    refuse_odd_heads(config.method, masked.model, masked.groups, parameters)
    try:
        structure = method.select(masked, parameters)
    except ValueError as error:
        raise ConfigError(f"{config.method}: {error}") from error
    run.progress(1, 2, "steps", "units chosen")
    cut(run.source, run.target, structure, masked.units, sizes_of(masked.model, structure))
    totals = _totals(run, masked.model)
    return CompressionReport(
        method=config.method,
        parameters=parameters.model_dump(mode="json"),
        layout=layout.LAYOUT_DENSE,
        loads_with=layout.loads_with(layout.LAYOUT_DENSE),
        not_informative=method.not_informative,
        calibration=CalibrationFacts(sequences=len(run.tokens_NT), seed=config.seed),
        totals=totals,
        layers={
            str(layer): CutLayer(
                groups=torch.where(structure.groups_LG[layer])[0].tolist(),
                neurons_removed=torch.where(~structure.neurons_LF[layer])[0].tolist(),
            )
            for layer in range(masked.layers)
        },
        comparison=_compare(run, masked, structure, totals),
    )


def check(method: str, masked: MaskedTransformer, config: StructureConfig) -> None:
    """Refuse shares that the layout does not allow, or that remove nothing.

    Raises:
        ConfigError: naming method, key and what is valid.
    """
    if config.heads and not masked.groups:
        raise ConfigError(
            f"{method}: heads = {config.heads:g}, but {type(masked.model).__name__} takes the size of a head from the "
            "number of heads, so none can go; valid: heads = 0",
            hint="remove neurons only",
        )
    for key, units, share in (("heads", masked.groups, config.heads), ("neurons", masked.neurons, config.neurons)):
        if share and structured.removed(units, share) == 0:
            raise ConfigError(
                f"{method}: {key} = {share:g} of {units} removes none; valid: {1 / units:.3g} or more, or 0"
                if units > 1
                else f"{method}: {key} = {share:g}, but there is one for each layer; valid: 0"
            )


def refuse_odd_heads(method: str, model: PreTrainedModel, groups: int, config: StructureConfig) -> None:
    """Refuse as many heads as transformers does not load: they must divide the width.

    Raises:
        ConfigError: with the shares that leave a number of heads which loads.
    """
    width, each = model.config.hidden_size, model.config.num_attention_heads // max(groups, 1)
    left = groups - structured.removed(groups, config.heads)
    if not config.heads or width % (left * each) == 0:
        return
    valid = [f"{1 - n / groups:g}" for n in range(groups - 1, 0, -1) if width % (n * each) == 0]
    raise ConfigError(
        f"{method}: heads = {config.heads:g} leaves {left * each} heads, which do not divide the width {width}; "
        f"valid: {', '.join(valid) or 0}",
        hint="plain transformers loads no other number; remove neurons instead of the rest",
    )


def cut(source: Path, target: Path, structure: Structure, units: Mapping[str, Unit], sizes: Mapping[str, int]) -> None:
    """Write the smaller model folder, tensor by tensor.

    Args:
        source: model folder of the base.
        target: folder to write.
        structure: what stays.
        units: where units are in a block, from `masked_model.units_of`.
        sizes: entries of `config.json` that change, from `sizes_of`.
    """
    reader, (stack, _) = WeightReader(source), meta_init.blocks(meta_init.build(source))
    folder.copy_companions(source, target)
    writer = WeightWriter(target)
    for name in reader.names():
        writer.add(name, sliced(name.removeprefix(f"{stack}."), reader.dense(name), structure, units))
    writer.close()
    config = read_json(source / "config.json")
    config.pop("quantization_config", None)
    write_json(target / "config.json", config | dict(sizes))


def sliced(name: str, tensor: Tensor, structure: Structure, units: Mapping[str, Unit]) -> Tensor:
    """Return one parameter without what was cut; `name` is `LAYER.path.weight` inside the stack."""
    layer, _, path = name.partition(".")
    module, _, leaf = path.rpartition(".")
    for kind, unit in units.items():
        if module == unit.reads and leaf == "weight":
            return tensor[:, _places(structure.masks(kind)[int(layer)], tensor.shape[1])]
        if module in unit.writes:
            kept = structure.masks(kind)[int(layer)].repeat(unit.writes[module])
            return tensor[_places(kept, tensor.shape[0])]
    return tensor


def _places(kept_U: Tensor, size: int) -> Tensor:
    return kept_U.repeat_interleave(size // len(kept_U))


def sizes_of(model: PreTrainedModel, structure: Structure) -> dict[str, int]:
    """Return the entries of `config.json` that change."""
    config, sizes = model.config, {"intermediate_size": int(structure.neurons_LF[0].sum())}
    if structure.groups_LG.shape[1]:
        groups = int(structure.groups_LG[0].sum())
        each = config.num_attention_heads // config.num_key_value_heads
        sizes |= {"num_key_value_heads": groups, "num_attention_heads": groups * each, "head_dim": config.head_dim}
    return sizes


def _totals(run: CompressionRun, base: PreTrainedModel) -> Totals:
    variant = WeightReader(run.target)
    stored = [variant.dense(name) for name in variant.names()]
    weights = sum(tensor.numel() for tensor in stored)
    return Totals(
        layers=base.config.num_hidden_layers,
        weights=weights,
        base_weights=sum(parameter.numel() for parameter in base.parameters()),
        bits_per_weight=8 * sum(tensor.nbytes for tensor in stored) / weights,
        model_bits_per_weight=8 * variant.bytes / run.base_weights,
        layer_bytes=variant.bytes,
        base_layer_bytes=run.reader.bytes,
        bytes=variant.bytes,
        base_bytes=run.reader.bytes,
        ratio=run.reader.bytes / variant.bytes,
    )


def _compare(run: CompressionRun, masked: MaskedTransformer, structure: Structure, totals: Totals) -> Comparison | None:
    """Compare the structure with others of its size; None where there is no text, or none is wanted."""
    documents = run.config.baseline_documents
    text = run.quick_eval(documents, "first") if documents else None
    if text is None:
        return None
    assert isinstance(run.config.parameters, StructureConfig)
    parameters = structured.shares_of(structure, run.config.parameters)
    others = registry.structure(run.config.method).baselines(masked, parameters)

    def contenders() -> Iterator[Contender]:
        yield Contender("the base", text.nats(masked.model, "the base"))
        for name, kept in {run.config.method: structure, **others}.items():
            with masked.without(kept):
                yield Contender(name, text.nats(masked.model, name), bytes=totals.layer_bytes)

    return baselines.compare(run, text, contenders(), count=1 + len(others))
