"""What only a whole model can decide: the best of a method's candidates, and the layers that are left alone.

Both hold the whole model in memory and look at validation text that no comparison uses (see `yardstick`).
Partial quantization is that of Wu et al. 2020 (arXiv 2004.09602): layers are compressed one at a time and ranked by the
loss; from the most sensitive on they are left as they are until the loss is within the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from models.compression.base import MethodConfig, Packed, WeightMethod
from models.compression.modules.packed_linear import PackedLinear
from pipelines.compression import quick_eval
from pipelines.compression.config import CompressConfig
from pipelines.compression.quick_eval import Yardstick
from pipelines.compression.sequential import Walker
from pipelines.core.errors import ConfigError
from pipelines.modelio.load import load_model


def decide(
    config: CompressConfig,
    walker: Walker,
    method: WeightMethod[Any],
    parameters: MethodConfig,
    names: Sequence[str],
    prepare: Path,
) -> tuple[MethodConfig, list[str], dict[str, Any]]:
    """Return the parameters and layers to compress, and what to report of how they were found.

    Raises:
        ConfigError: a choice is asked for, and there is no validation text or no answer within the tolerance.
    """
    candidates = method.candidates(parameters)
    if len(candidates) == 1 and not config.tolerance:
        return parameters, list(names), {}
    text = quick_eval.build(prepare, config.arms_documents, walker.model, walker.device, end="last")
    if text is None:
        raise ConfigError(f"{config.method}: choices are made on validation documents; {prepare} has fewer than two")
    report: dict[str, Any] = {}
    if len(candidates) > 1:
        parameters, report["candidates"] = candidate(walker, method, candidates, names, text)
    if config.tolerance:
        found = partial(walker, method, parameters, names, tolerance=config.tolerance, text=text)
        report["partial"] = found
        names = [name for name in names if name not in found["kept"]]
    return parameters, list(names), report


def candidate(
    walker: Walker, method: WeightMethod[Any], candidates: Sequence[MethodConfig], names: Sequence[str], text: Yardstick
) -> tuple[MethodConfig, dict[str, float]]:
    """Return the candidate with the least loss, and the losses of all in nats per token, by label."""
    model = load_model(walker.folder)
    losses = [loss(model, everything(walker, method, config, names), text, config.label) for config in candidates]
    best = min(range(len(losses)), key=losses.__getitem__)
    return candidates[best], {config.label: value for config, value in zip(candidates, losses, strict=True)}


def partial(
    walker: Walker,
    method: WeightMethod[Any],
    config: MethodConfig,
    names: Sequence[str],
    *,
    tolerance: float,
    text: Yardstick,
) -> dict[str, Any]:
    """Return which layers to leave alone: {"kept", "sensitivity", "ratio", "ratio_of_all"}.

    `sensitivity` is the perplexity over the parent's with that layer alone compressed, the most sensitive first;
    `ratio` is that of the model with all layers but `kept` compressed.

    Raises:
        ConfigError: not even one compressed layer is within the tolerance.
    """
    model = load_model(walker.folder)
    packed = everything(walker, method, config, names)
    base = text.loss(model, "the parent")

    def ratio(chosen: Sequence[str]) -> float:
        return math.exp(loss(model, {n: packed[n] for n in chosen}, text, "the child") - base)

    of_all = found = ratio(names)
    alone: dict[str, float] = {}
    kept: list[str] = []
    if found > 1 + tolerance:
        alone = {name: ratio([name]) for name in names}
        ranked = sorted(names, key=lambda name: -alone[name])
        while found > 1 + tolerance and len(kept) < len(names) - 1:
            kept.append(ranked[len(kept)])
            found = ratio([name for name in names if name not in kept])
    if found > 1 + tolerance:
        raise ConfigError(
            f"compress.tolerance = {tolerance}: the perplexity is {found:.4f} times the parent's with one layer left",
            hint="raise the tolerance, or give the method more bits",
        )
    ordered = dict(sorted(alone.items(), key=lambda item: -item[1]))
    return {"kept": sorted(kept), "sensitivity": ordered, "ratio": found, "ratio_of_all": of_all}


def everything(
    walker: Walker, method: WeightMethod[Any], config: MethodConfig, names: Sequence[str]
) -> dict[str, Packed]:
    """Return all layers, each compressed behind the compressed ones before it."""
    return {name: layer.packed for block in walker.walk(method, config, names) for name, layer in block.items()}


def loss(model: PreTrainedModel, packed: Mapping[str, Packed], text: Yardstick, name: str) -> float:
    """Return the loss of a model with some layers compressed, in nats per token; the model is left as it was."""
    originals = {layer: model.get_submodule(layer) for layer in packed}
    for layer, weight in packed.items():
        old = originals[layer]
        dense_OI = weight.dequantize().to(old.get_parameter("weight"))
        bias = getattr(old, "bias", None)
        model.set_submodule(layer, PackedLinear(weight, dense_OI, None if bias is None else bias.detach()))
    try:
        return text.loss(model, name)
    finally:
        for layer, old in originals.items():
            model.set_submodule(layer, old)
