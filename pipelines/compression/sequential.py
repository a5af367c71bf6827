"""Compression block by block, each calibrated on the output of the blocks already compressed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.compression.base import MethodConfig, Packed, Statistics, WeightMethod, relative_error
from models.compression.modules import packed_linear
from pipelines.compression import block_reconstruction, calibration, sensitivity
from pipelines.compression.calibration import Prefix
from pipelines.compression.report import PackedLayer, Reconstruction
from pipelines.compression.run import CompressionRun
from pipelines.core import heap
from pipelines.core.errors import ConfigError
from pipelines.modelio import meta_init


@dataclass(frozen=True)
class Assignment:
    """Which layers are compressed, by which method, with which parameters."""

    method: WeightMethod[Any]
    config: MethodConfig
    names: Sequence[str]
    of_layer: Mapping[str, MethodConfig] = field(default_factory=dict)
    """Parameters of layers that have their own, where bits were shared out."""

    def parameters(self, name: str) -> MethodConfig:
        """Return the parameters of one layer."""
        return self.of_layer.get(name, self.config).for_layer(name)


@dataclass(frozen=True)
class CompressedLayer:
    """One compressed layer, on the device that computed it."""

    packed: Packed
    shape: tuple[int, int]
    weight_error: float
    output_error: float | None
    """None without calibration; errors as in `report.PackedLayer`."""
    baselines: dict[str, float] = field(default_factory=dict)
    reconstruction: Reconstruction | None = None
    """How learning its whole block went, where that was asked for."""

    def report(self, stored_bits: int) -> PackedLayer:
        """Return the layer's row of the report; `stored_bits` is its size in the folder."""
        return PackedLayer(
            shape=self.shape,
            stored_bits=stored_bits,
            bits_per_weight=stored_bits / (self.shape[0] * self.shape[1]),
            weight_error=self.weight_error,
            output_error=self.output_error,
            baselines=self.baselines,
            reconstruction=self.reconstruction,
        )


def targets(model: PreTrainedModel, skip: Sequence[str]) -> list[str]:
    """Return the names of the linear layers inside the stack, without those that match a pattern of `skip`.

    Raises:
        ConfigError: a pattern that matches nothing, or nothing left to compress.
    """
    stack, _ = meta_init.blocks(model)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(f"{stack}.")]
    for pattern in skip:
        if not fnmatch.filter(linear, pattern):
            raise ConfigError(
                f"compress.skip: {pattern!r} matches no layer", hint=f"layers: {', '.join(linear[:8])}, …"
            )
    left = [name for name in linear if not any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)]
    if not left:
        raise ConfigError(f"compress.skip = {list(skip)} leaves no layer to compress")
    return left


@torch.no_grad()
def compress_blocks(
    run: CompressionRun, assignment: Assignment, *, baselines: bool = False
) -> Iterator[dict[str, CompressedLayer]]:
    """Yield the compressed layers of one block after another.

    Blocks are computed on the run's device, one at a time; statistics and packed layers stay there.

    Args:
        run: the base model, and what it is calibrated on. Where the method needs gradients, `sensitivity.record` has
            been called.
        assignment: what becomes of which layer.
        baselines: also measure the method's baselines on each layer.

    Raises:
        ConfigError: the method does not fit a layer, which is named.
        NumericError: calibration met activations that are not finite.
    """
    model, method, steps = run.base, assignment.method, assignment.config.block_steps
    needs = method.needs(assignment.config)
    stack, blocks = meta_init.blocks(model)
    prefix = original = rows_R = None
    if needs.sequences:
        meta_init.load_rest(model, stack, run.reader, run.device)
        prefix = calibration.enter(model, blocks, run.text, run.device, in_tuples=run.description.in_tuples)
        original = prefix.fork() if needs.inputs or steps else None
        rows_R = calibration.sample_rows(prefix.tokens) if needs.inputs else None
    for index, block in enumerate(blocks):
        place = f"{stack}.{index}"
        meta_init.load(block, place, run.reader, run.device, model.dtype)
        linear = calibration.linear_layers(model, place, assignment.names)
        seen = {name: Statistics() for name in linear}
        if prefix is not None:
            seen = calibration.measure(block, linear, index, prefix, rows_R=rows_R, original=original)
        if needs.gradients:
            squares = sensitivity.read(run.fisher, index, run.device)
            seen = {name: replace(statistics, fisher_OI=squares[name]) for name, statistics in seen.items()}
        # Only where they are needed: beside the compressed ones they are a second block in memory.
        weights = {name: module.weight.detach().float() for name, module in linear.items()} if steps else {}
        layers = {name: _compress(model, name, seen[name], assignment, baselines=baselines) for name in linear}
        if prefix is not None and original is not None and steps:
            layers = _reconstruct(model, place, index, prefix, original.hidden, steps, layers, weights, seen)
        try:
            yield layers
            if prefix is not None:
                prefix.advance(index, block)
        finally:  # also where nobody asks for the next block: a packed layer would stay in the base model
            for name, module in linear.items():
                model.set_submodule(name, module)
            meta_init.release(block)
            heap.trim()


def _compress(
    model: PreTrainedModel, name: str, seen: Statistics, assignment: Assignment, *, baselines: bool
) -> CompressedLayer:
    """Compress one layer and put what it became into the model."""
    weight_OI = model.get_parameter(f"{name}.weight").detach().float()
    method, config = assignment.method, assignment.parameters(name)
    try:
        packed = method.compress(weight_OI, seen, config)
        others = method.baselines(weight_OI, seen, config) if baselines and seen.hessian_II is not None else {}
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    dense_OI = packed_linear.put(model, name, packed)
    return CompressedLayer(
        packed,
        shape=(weight_OI.shape[0], weight_OI.shape[1]),
        weight_error=relative_error(weight_OI, dense_OI),
        output_error=_output_error(weight_OI, dense_OI, seen),
        baselines={n: relative_error(weight_OI, p.dequantize(), seen.hessian_II) for n, p in sorted(others.items())},
    )


def _reconstruct(
    model: PreTrainedModel,
    place: str,
    index: int,
    prefix: Prefix,
    outputs: Sequence[Tensor],
    steps: int,
    layers: Mapping[str, CompressedLayer],
    weights: Mapping[str, Tensor],
    seen: Mapping[str, Statistics],
) -> dict[str, CompressedLayer]:
    """Optimise the compressed layers of a block together; what they became is kept where the block came nearer."""
    block, (_, judges) = model.get_submodule(place), block_reconstruction.split(prefix.groups())
    before = block_reconstruction.relative_error(block, index, prefix, outputs, judges)
    learnable = {name: block_reconstruction.learnable(weights[name], layer.packed) for name, layer in layers.items()}
    learned = {name: layer for name, layer in learnable.items() if layer is not None}
    inside = {name.removeprefix(f"{place}."): layer for name, layer in learned.items()}
    block_reconstruction.optimise(block, inside, index, prefix, outputs, steps=steps)
    packed = {name: layer.pack() for name, layer in learned.items()}
    dense = {name: packed_linear.put(model, name, layer) for name, layer in packed.items()}
    after = block_reconstruction.relative_error(block, index, prefix, outputs, judges)
    facts = Reconstruction(before=before, after=after, kept=after < before)
    reconstructed = {name: replace(layer, reconstruction=facts) for name, layer in layers.items()}
    for name, dense_OI in dense.items():
        if not facts.kept:
            packed_linear.put(model, name, layers[name].packed)
            continue
        reconstructed[name] = replace(
            reconstructed[name],
            packed=packed[name],
            weight_error=relative_error(weights[name], dense_OI),
            output_error=_output_error(weights[name], dense_OI, seen[name]),
        )
    return reconstructed


def _output_error(weight_OI: Tensor, dense_OI: Tensor, seen: Statistics) -> float | None:
    return None if seen.hessian_II is None else relative_error(weight_OI, dense_OI, seen.hessian_II)
