"""What only a whole model can decide: the best of a method's candidates, and the layers that are left alone.

Both hold the whole model in memory and look at validation text that no comparison uses (see `quick_eval`).
Partial quantization is that of Wu et al. 2020 (arXiv 2004.09602): layers are compressed one at a time and ranked by the
loss; from the most sensitive on they are left as they are until the loss is within the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from models.compression.base import MethodConfig, Packed
from models.compression.modules.packed_linear import PackedLinear
from pipelines.compression.quick_eval import QuickEval
from pipelines.compression.report import Partial
from pipelines.compression.run import CompressionRun
from pipelines.compression.sequential import Assignment, compress_blocks
from pipelines.core.errors import ConfigError


@dataclass(frozen=True)
class Selection:
    """What was decided, and what to report of it."""

    assignment: Assignment
    candidates: dict[str, float] | None = None
    partial: Partial | None = None


def select(run: CompressionRun, assignment: Assignment) -> Selection:
    """Return the parameters and the layers to compress.

    Raises:
        ConfigError: a choice is asked for, and there is no validation text or no answer within the tolerance.
    """
    config, losses, partial = run.config, None, None
    candidates = assignment.method.candidates(assignment.config)
    if len(candidates) == 1 and not config.tolerance:
        return Selection(assignment)
    text = run.quick_eval(config.baseline_documents, "last")
    if text is None:
        raise ConfigError(
            f"{config.method}: choices are made on validation documents; {run.prepare} has fewer than two"
        )
    if len(candidates) > 1:
        assignment, losses = best_candidate(run, assignment, candidates, text)
    if config.tolerance:
        partial = within_tolerance(run, assignment, text, tolerance=config.tolerance)
        assignment = replace(assignment, names=[name for name in assignment.names if name not in partial.kept])
    return Selection(assignment, losses, partial)


def best_candidate(
    run: CompressionRun, assignment: Assignment, candidates: Sequence[MethodConfig], text: QuickEval
) -> tuple[Assignment, dict[str, float]]:
    """Return the candidate with the least loss, and the losses of all in nats per token, by label."""
    model = run.load_base()
    losses = [
        loss(model, all_layers(run, replace(assignment, config=config)), text, config.label) for config in candidates
    ]
    best = min(range(len(losses)), key=losses.__getitem__)
    by_label = {config.label: value for config, value in zip(candidates, losses, strict=True)}
    return replace(assignment, config=candidates[best]), by_label


def within_tolerance(run: CompressionRun, assignment: Assignment, text: QuickEval, *, tolerance: float) -> Partial:
    """Return which layers to leave alone so that the perplexity grows by no more than `tolerance`.

    Raises:
        ConfigError: not even one compressed layer is within the tolerance.
    """
    model, names = run.load_base(), assignment.names
    packed = all_layers(run, assignment)
    base = text.loss(model, "the base")

    def ratio(compressed: Sequence[str]) -> float:
        return math.exp(loss(model, {name: packed[name] for name in compressed}, text, "the variant") - base)

    ratio_of_all = now = ratio(names)
    alone: dict[str, float] = {}
    kept: list[str] = []
    if now > 1 + tolerance:
        alone = {name: ratio([name]) for name in names}
        ranked = sorted(names, key=lambda name: -alone[name])
        while now > 1 + tolerance and len(kept) < len(names) - 1:
            kept.append(ranked[len(kept)])
            now = ratio([name for name in names if name not in kept])
    if now > 1 + tolerance:
        raise ConfigError(
            f"compress.tolerance = {tolerance}: the perplexity is {now:.4f} times the base's with one layer left",
            hint="raise the tolerance, or give the method more bits",
        )
    return Partial(kept=sorted(kept), sensitivity=alone, ratio=now, ratio_of_all=ratio_of_all)


def all_layers(run: CompressionRun, assignment: Assignment) -> dict[str, Packed]:
    """Return all layers, each compressed behind the compressed ones before it."""
    return {name: layer.packed for block in compress_blocks(run, assignment) for name, layer in block.items()}


def loss(model: PreTrainedModel, packed: Mapping[str, Packed], text: QuickEval, name: str) -> float:
    """Return the loss of a model with some layers compressed, in nats per token; the model is left as it was."""
    originals = {layer: model.get_submodule(layer) for layer in packed}
    for layer, weight in packed.items():
        old = originals[layer]
        assert isinstance(old, nn.Linear)
        bias = None if old.bias is None else old.bias.detach()
        model.set_submodule(layer, PackedLinear(weight, weight.dequantize().to(old.weight), bias))
    try:
        return text.loss(model, name)
    finally:
        for layer, module in originals.items():
            model.set_submodule(layer, module)
