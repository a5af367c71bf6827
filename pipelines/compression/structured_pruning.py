"""Methods of kind "structure": attention groups and feed-forward neurons cut out of every layer.

The child is a smaller model that plain transformers loads: fewer heads, a smaller `intermediate_size`. Public
configurations have one number of each for all layers, so every layer loses equally many; which ones is the method's
choice. Nothing is trained here; a distilled child `from` this one recovers more.

compression.json has the held-out loss of the child beside arms of the same size: largest weights, and the best and the
median of some random structures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from models.compression import registry
from models.compression.solvers import structured
from models.compression.solvers.structured import Structure, StructureConfig
from pipelines.compression import calibration
from pipelines.compression.config import CompressConfig
from pipelines.compression.masked_model import Family, ModelProblem
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, NumericError
from pipelines.core.stage import Progress, StageContext, Summary
from pipelines.data.shards import ShardReader
from pipelines.measure import intervals
from pipelines.modelio import folder, meta_init
from pipelines.modelio.folder import WeightReader, WeightWriter, write_json
from pipelines.modelio.load import load_weights

_HELD = 64
"""Validation sequences that the child and the arms are compared on."""


def run(config: CompressConfig, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> Summary:
    """Cut units out of `inputs["model"]`, chosen on training sequences of `inputs["prepare"]`.

    Raises:
        ConfigError: the family has no such units, the shares round to none, or there is too little text to compare
            on; the method is named.
        NumericError: a loss is not finite.
    """
    method, source, target = registry.structure(config.method), inputs["model"].path / "model", out_dir / "model"
    model, parameters = load_weights(source), config.parameters
    assert isinstance(parameters, StructureConfig)
    prepared, encoder = inputs["prepare"].path, type(model).__name__.endswith("ForMaskedLM")
    tokens, targets = calibration_pairs(prepared, config.samples, config.seed, masked=encoder)
    problem = ModelProblem(model, tokens, targets)
    check(config.method, problem, parameters)
    refuse_odd_heads(config.method, model, problem.groups, parameters)
    held = held_out_pairs(prepared, masked=encoder)
    refuse_too_few(config.method, len(tokens if held is None else held[0]), held_out=held is not None)
    chosen = method.select(problem, parameters)
    context.report(Progress(context.node, 1, 2, "steps", "units chosen"))
    arms = method.baselines(problem, parameters)
    judge = problem if held is None else ModelProblem(model, *held)
    losses = {name: sequence_losses(judge, s) for name, s in {config.method: chosen, **arms}.items()}
    parent_losses = sequence_losses(judge, None)
    cut(source, target, chosen, problem.family, _sizes(model, chosen))
    totals = _totals(WeightReader(source), WeightReader(target), model)
    report = {
        "method": config.method,
        "parameters": parameters.model_dump(mode="json"),
        "layout": "transformers",
        "loads_with": "transformers",
        "calibration": {"sequences": len(tokens), "seed": config.seed},
        "not_informative": "",
        "totals": totals,
        "errors": {"parent_loss": float(parent_losses.mean()), "held_out": held is not None}
        | compare(losses, config.method),
        "arms": {name: _arm(found, parent_losses, totals["layer_bytes"]) for name, found in losses.items()},
        "layers": _kept(chosen),
    }
    write_json(out_dir / "compression.json", report)
    return {key: report[key] for key in ("method", "parameters", "layout", "totals", "errors")}


def check(method: str, problem: ModelProblem, config: StructureConfig) -> None:
    """Refuse shares that the layout does not allow, or that remove nothing.

    Raises:
        ConfigError: naming method, key and what is valid.
    """
    if config.heads and not problem.groups:
        raise ConfigError(
            f"{method}: heads = {config.heads:g}, but {type(problem.model).__name__} takes the size of a head from the "
            "number of heads, so none can go; valid: heads = 0",
            hint="remove neurons only",
        )
    for key, units, share in (("heads", problem.groups, config.heads), ("neurons", problem.neurons, config.neurons)):
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


def refuse_too_few(method: str, sequences: int, *, held_out: bool) -> None:
    """Refuse fewer sequences than an interval over them needs.

    Raises:
        ConfigError: naming the method, what there is and what to change.
    """
    if sequences >= 2:
        return
    kind, key = ("validation", "prepare.validation_fraction") if held_out else ("calibration", "compress.samples")
    raise ConfigError(
        f"{method}: {sequences} {kind} sequence to compare the child and its arms on; intervals need at least 2",
        hint=f"raise {key}",
    )


def calibration_pairs(
    prepared: Path, samples: int, seed: int, *, masked: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return calibration sequences and their targets, -100 where nothing is predicted."""
    tokens = calibration.sample_tokens(prepared, samples=samples, seed=seed, masked=False)
    if not masked:
        return tokens, _next_tokens(tokens)
    shown = calibration.sample_tokens(prepared, samples=samples, seed=seed, masked=True)
    return shown, np.where(shown != tokens, tokens, -100)


def held_out_pairs(prepared: Path, *, masked: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Return the first validation sequences and their targets; None where the split is missing."""
    index = json.loads((prepared / "index.json").read_text(encoding="utf-8"))
    if "validation" not in index["splits"]:
        return None
    reader = ShardReader(prepared, "validation")
    tokens = reader.take(np.arange(min(_HELD, len(reader))))
    if not masked:
        return tokens, _next_tokens(tokens)
    special = [reader.index[key] for key in ("bos_id", "eos_id", "pad_id", "mask_id")]
    hidden = (np.random.default_rng(0).random(tokens.shape) < 0.3) & ~np.isin(tokens, special)
    return np.where(hidden, reader.index["mask_id"], tokens), np.where(hidden, tokens, -100)


def sequence_losses(problem: ModelProblem, structure: Structure | None) -> NDArray[np.float64]:
    """Return the loss of every sequence [N], nats a token.

    Raises:
        NumericError: one is not finite.
    """
    losses = problem.losses(structure).double().numpy()
    if not np.isfinite(losses).all():
        raise NumericError("the pruned model gives losses that are not finite")
    return losses


def compare(losses: Mapping[str, NDArray[np.float64]], method: str) -> dict[str, Any]:
    """Return the mean losses of child and arms, and what each arm loses more than the child, with intervals."""
    child = losses[method]
    arms = {arm: found for arm, found in losses.items() if arm != method}
    return {
        "loss": float(child.mean()),
        "null": {arm: float(found.mean()) for arm, found in arms.items()},
        "worse": {arm: intervals.paired_difference(found, child).to_json() for arm, found in arms.items()},
    }


def cut(source: Path, target: Path, structure: Structure, family: Family, sizes: Mapping[str, int]) -> None:
    """Write the smaller model folder, tensor by tensor."""
    reader, (stack, _) = WeightReader(source), meta_init.blocks(meta_init.build(source))
    folder.copy_companions(source, target)
    writer = WeightWriter(target)
    for name in reader.names():
        writer.add(name, sliced(name.removeprefix(f"{stack}."), reader.dense(name), structure, family))
    writer.close()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    write_json(target / "config.json", config | dict(sizes))


def sliced(name: str, tensor: Tensor, structure: Structure, family: Family) -> Tensor:
    """Return one parameter without what was cut; `name` is `LAYER.path.weight` inside the stack."""
    layer, _, path = name.partition(".")
    module, _, leaf = path.rpartition(".")
    for kind, unit in family.units.items():
        if module == unit.reads and leaf == "weight":
            return tensor[:, _places(structure.masks(kind)[int(layer)], tensor.shape[1])]
        if module in unit.writes:
            kept = structure.masks(kind)[int(layer)].repeat(unit.writes[module])
            return tensor[_places(kept, tensor.shape[0])]
    return tensor


def _places(kept_U: Tensor, size: int) -> Tensor:
    return kept_U.repeat_interleave(size // len(kept_U))


def _next_tokens(tokens_NT: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([tokens_NT[:, 1:], np.full_like(tokens_NT[:, :1], -100)], axis=1)


def _sizes(model: PreTrainedModel, structure: Structure) -> dict[str, int]:
    """Return the entries of `config.json` that change."""
    config, sizes = model.config, {"intermediate_size": int(structure.neurons_LF[0].sum())}
    if structure.groups_LG.shape[1]:
        groups = int(structure.groups_LG[0].sum())
        each = config.num_attention_heads // config.num_key_value_heads
        sizes |= {"num_key_value_heads": groups, "num_attention_heads": groups * each, "head_dim": config.head_dim}
    return sizes


def _kept(structure: Structure) -> dict[str, dict[str, list[int]]]:
    """Return the numbers of the groups that stay, and of the neurons that go, of every layer."""
    return {
        str(layer): {
            "groups": torch.where(structure.groups_LG[layer])[0].tolist(),
            "neurons_removed": torch.where(~structure.neurons_LF[layer])[0].tolist(),
        }
        for layer in range(len(structure.neurons_LF))
    }


def _arm(losses: NDArray[np.float64], parent: NDArray[np.float64], size: int) -> dict[str, Any]:
    """Return an arm as reports draw it: loss over the parent's, and bytes, which are the same for all."""
    return {"ratio": intervals.paired_ratio(losses, parent, np.ones_like(losses)).to_json(), "bytes": size}


def _totals(parent: WeightReader, child: WeightReader, model: PreTrainedModel) -> dict[str, Any]:
    stored = [child.dense(name) for name in child.names()]
    weights = sum(tensor.numel() for tensor in stored)
    return {
        "layers": model.config.num_hidden_layers,
        "weights": weights,
        "parent_weights": sum(p.numel() for p in model.parameters()),
        "bits_per_weight": 8 * sum(t.numel() * t.element_size() for t in stored) / weights,
        "layer_bytes": child.bytes,
        "parent_layer_bytes": parent.bytes,
        "bytes": child.bytes,
        "parent_bytes": parent.bytes,
        "ratio": parent.bytes / child.bytes,
    }
