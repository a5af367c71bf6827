"""The walk through a model, block by block, each calibrated on the output of the blocks already compressed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.compression.base import MethodConfig, Packed, Statistics, WeightMethod, relative_error
from models.compression.modules import packed_linear
from pipelines.compression import block_reconstruction, calibration, sensitivity
from pipelines.core.errors import ConfigError
from pipelines.modelio import meta_init
from pipelines.modelio.folder import WeightReader


@dataclass(frozen=True)
class Layer:
    """One compressed layer."""

    packed: Packed
    shape: tuple[int, int]
    weight_error: float
    """||W - W'||^2 / ||W||^2."""
    output_error: float | None
    """||X (W - W')^T||^2 / ||X W^T||^2 on the calibration tokens; None without calibration."""
    null: dict[str, float] = field(default_factory=dict)
    """The same error for naive choices at the same stored bits."""

    def report(self, stored_bits: int) -> dict[str, Any]:
        """Return the layer's row of `compression.json`; `stored_bits` is its size in the folder."""
        row: dict[str, Any] = {"shape": list(self.shape), "stored_bits": stored_bits}
        row |= {"bits_per_weight": stored_bits / (self.shape[0] * self.shape[1]), "weight_error": self.weight_error}
        if self.output_error is not None:
            row |= {"output_error": self.output_error, "null": self.null}
        return row


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


@dataclass(frozen=True)
class Walker:
    """A model that can be walked again and again, always calibrated on the same sequences."""

    model: PreTrainedModel
    """Skeleton of the parent."""
    reader: WeightReader
    device: torch.device
    tokens_NT: NDArray[np.int64] | None = None
    rows: int = 0
    fisher: Path | None = None

    @property
    def folder(self) -> Path:
        """The parent's model folder."""
        return self.reader.folder

    def walk(
        self,
        method: WeightMethod[Any],
        config: MethodConfig,
        names: Sequence[str],
        plan: Mapping[str, MethodConfig] = MappingProxyType({}),
    ) -> Iterator[dict[str, Layer]]:
        """Yield the layers `names` compressed with a method, block by block; see `walk`."""
        return walk(
            self.model,
            self.reader,
            method,
            config,
            names=names,
            tokens_NT=self.tokens_NT,
            device=self.device,
            plan=plan,
            rows=self.rows,
            fisher=self.fisher,
        )


@torch.no_grad()
def walk(
    model: PreTrainedModel,
    reader: WeightReader,
    method: WeightMethod[Any],
    config: MethodConfig,
    *,
    names: Sequence[str],
    tokens_NT: NDArray[np.int64] | None,
    device: torch.device,
    plan: Mapping[str, MethodConfig] = MappingProxyType({}),
    rows: int = 0,
    fisher: Path | None = None,
) -> Iterator[dict[str, Layer]]:
    """Yield the compressed layers of one block after another.

    Args:
        model: skeleton from `skeleton.build`; its parameters come and go.
        reader: where the parent's weights are.
        method: the method.
        config: its parameters.
        names: layers to compress.
        tokens_NT: calibration sequences; None for methods that need none.
        device: where blocks are computed.
        plan: parameters of layers that have their own.
        rows: at most so many input rows of each layer are shown to the method, from the compressed prefix and from the
            original model, which is then followed beside it; 0 shows none.
        fisher: folder that `gradients.record` has filled; None shows no gradients.
    """
    stack, blocks = meta_init.blocks(model)
    prefix = original = rows_R = None
    if tokens_NT is not None:
        meta_init.load_rest(model, stack, reader, device)
        prefix = calibration.enter(model, blocks, tokens_NT, device)
        if rows or config.block_steps:
            original = prefix.fork()
        if rows:
            rows_R = calibration.sample_rows(prefix.tokens, rows)
    for index, block in enumerate(blocks):
        place = f"{stack}.{index}"
        meta_init.load(block, place, reader, device, model.dtype)
        chosen = {n: model.get_submodule(n) for n in names if n.startswith(f"{place}.")}
        linear = {n: m for n, m in chosen.items() if isinstance(m, nn.Linear)}
        measured: dict[str, Statistics] = {}
        if prefix is not None:
            measured = calibration.measure(block, linear, index, prefix, rows_R=rows_R, original=original)
        if fisher is not None:
            squares = sensitivity.read(fisher, index)
            measured = {n: replace(seen, fisher_OI=squares[n]) for n, seen in measured.items()}
        seen = {n: measured.get(n, Statistics()) for n in linear}
        # Only where they are needed: held beside the compressed ones they are a second block in memory.
        weights = {n: m.weight.detach().cpu().float() for n, m in linear.items()} if config.block_steps else {}
        done = {n: _compress(model, n, seen[n], method, plan.get(n, config).for_layer(n)) for n in linear}
        if prefix is not None and original is not None and config.block_steps:
            done = _refine(model, place, index, prefix, original.hidden, config.block_steps, done, weights, seen)
        yield done
        if prefix is not None:
            prefix.advance(index, block)
        for name, module in linear.items():
            model.set_submodule(name, module)  # a packed one would keep its tensors
        meta_init.release(block)


def _compress(
    model: PreTrainedModel, name: str, seen: Statistics, method: WeightMethod[Any], config: MethodConfig
) -> Layer:
    """Compress one layer and put what it became into the model."""
    weight_OI = model.get_parameter(f"{name}.weight").detach().cpu().float()
    try:
        packed: Packed = method.compress(weight_OI, seen, config)
        arms: Mapping[str, Packed] = {} if seen.hessian_II is None else method.baselines(weight_OI, seen, config)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    dense_OI = packed_linear.put(model, name, packed)
    return Layer(
        packed,
        shape=(weight_OI.shape[0], weight_OI.shape[1]),
        weight_error=relative_error(weight_OI, dense_OI),
        output_error=_output_error(weight_OI, dense_OI, seen),
        null={arm: relative_error(weight_OI, p.dequantize(), seen.hessian_II) for arm, p in sorted(arms.items())},
    )


def _refine(
    model: PreTrainedModel,
    place: str,
    index: int,
    prefix: calibration.Prefix,
    targets: list[Tensor],
    steps: int,
    done: Mapping[str, Layer],
    weights: Mapping[str, Tensor],
    seen: Mapping[str, Statistics],
) -> dict[str, Layer]:
    """Optimise the compressed layers of a block together, and put what they became into the model."""
    found = {name: block_reconstruction.learnable(weights[name], layer.packed) for name, layer in done.items()}
    learned = {name: layer for name, layer in found.items() if layer is not None}
    inside = {name.removeprefix(f"{place}."): layer for name, layer in learned.items()}
    block = model.get_submodule(place)
    block_reconstruction.optimise(block, inside, index, prefix, targets, steps=steps)
    refined = dict(done)
    for name, layer in learned.items():
        packed = layer.pack()
        dense_OI = packed_linear.put(model, name, packed)
        refined[name] = replace(
            done[name],
            packed=packed,
            weight_error=relative_error(weights[name], dense_OI),
            output_error=_output_error(weights[name], dense_OI, seen[name]),
        )
    return refined


def _output_error(weight_OI: Tensor, dense_OI: Tensor, seen: Statistics) -> float | None:
    return None if seen.hessian_II is None else relative_error(weight_OI, dense_OI, seen.hessian_II)
