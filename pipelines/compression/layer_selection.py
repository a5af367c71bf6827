"""What only a whole model can decide: the best of a method's candidates, and the layers that are left alone.

Both look at validation text that no comparison uses (see `quick_eval`). The model is scored block by block, and
compressed layers wait in files, so that memory is bounded as that of the compression itself.
Partial quantization is that of Wu et al. 2020 (arXiv 2004.09602): layers are compressed one at a time and ranked by the
loss; from the most sensitive on they are left as they are until the loss is within the tolerance.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from models.compression.base import MethodConfig, Packed
from pipelines.compression import streaming
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
        partial = leave_alone(run, assignment, text, tolerance=config.tolerance)
        assignment = replace(assignment, names=[name for name in assignment.names if name not in partial.kept])
    return Selection(assignment, losses, partial)


def best_candidate(
    run: CompressionRun, assignment: Assignment, candidates: Sequence[MethodConfig], text: QuickEval
) -> tuple[Assignment, dict[str, float]]:
    """Return the candidate with the least loss, and the losses of all in nats per token, by label."""
    tokens = int(text.tokens_D.sum())
    losses = []
    for config in candidates:
        nats_D, _ = streaming.compressed_nats(run, text, config.label, replace(assignment, config=config))
        losses.append(float(nats_D.sum()) / tokens)
    best = min(range(len(losses)), key=losses.__getitem__)
    by_label = {config.label: value for config, value in zip(candidates, losses, strict=True)}
    return replace(assignment, config=candidates[best]), by_label


def leave_alone(run: CompressionRun, assignment: Assignment, text: QuickEval, *, tolerance: float) -> Partial:
    """Return which layers to leave alone so that the perplexity grows by no more than `tolerance`.

    Raises:
        ConfigError: not even one compressed layer is within the tolerance.
    """
    shelf = Shelf.filled(run, assignment)
    tokens, base = int(text.tokens_D.sum()), float(streaming.base_nats(run, text, "the base").sum())

    def ratio(compressed: Sequence[str]) -> float:
        packed = shelf.only(compressed)
        return math.exp((float(streaming.base_nats(run, text, "the variant", packed).sum()) - base) / tokens)

    partial = within_tolerance(assignment.names, ratio, tolerance=tolerance)
    shelf.clear()
    return partial


def within_tolerance(names: Sequence[str], ratio: Callable[[Sequence[str]], float], *, tolerance: float) -> Partial:
    """Return which of the layers `names` to leave alone.

    Args:
        names: all layers.
        ratio: perplexity over the base's with these layers compressed.
        tolerance: by how much it may grow.

    Raises:
        ConfigError: not even one compressed layer is within the tolerance.
    """
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


@dataclass(frozen=True)
class Shelf(Mapping[str, Packed]):
    """Compressed layers by name, each in a file of its own until it is asked for."""

    folder: Path
    assignment: Assignment
    names: tuple[str, ...]
    device: torch.device
    """Where layers are put."""

    @classmethod
    def filled(cls, run: CompressionRun, assignment: Assignment) -> Shelf:
        """Compress all layers, each behind the compressed ones before it."""
        shelf = cls(run.context.scratch / "layers", assignment, tuple(assignment.names), run.device)
        shelf.clear()
        shelf.folder.mkdir(parents=True)
        for block in compress_blocks(run, assignment):
            for name, layer in block.items():
                stored = {leaf: tensor.cpu().contiguous() for leaf, tensor in layer.packed.tensors().items()}
                save_file(stored, shelf.folder / f"{name}.safetensors")
        return shelf

    def only(self, names: Sequence[str]) -> Shelf:
        """Return some of the layers."""
        return replace(self, names=tuple(names))

    def clear(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __getitem__(self, name: str) -> Packed:
        if name not in self.names:
            raise KeyError(name)
        stored = {k: v.to(self.device) for k, v in load_file(self.folder / f"{name}.safetensors").items()}
        return self.assignment.method.restore(stored, self.assignment.parameters(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
