"""What a child is compared with at equal stored bytes: round to nearest, GPTQ, and the naive choices of its own method.

Measured on validation documents, as bits per byte over the parent's, with intervals over documents. An integer grid is
never smaller than the child: the one whose bytes are nearest from above is taken, and the bytes of every arm are
recorded. Every arm is in memory as a whole while it is measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from models.compression import gptq, rtn
from models.compression.base import MethodConfig, Packed, Statistics, WeightMethod
from models.compression.formats.int_grid import group_for
from models.compression.modules import packed_linear
from pipelines.compression import calibration, quick_eval
from pipelines.compression.config import CompressConfig
from pipelines.compression.quick_eval import Floats, Yardstick
from pipelines.compression.sequential import Walker
from pipelines.core.stage import Progress, StageContext
from pipelines.measure import intervals
from pipelines.modelio import meta_init
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model

_GROUPS = (0, 256, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Arm:
    """One way to spend the bytes."""

    name: str
    method: WeightMethod[Any]
    config: MethodConfig
    plan: Mapping[str, MethodConfig] = field(default_factory=dict)
    """Parameters of layers that have their own."""


def measure(
    config: CompressConfig,
    walker: Walker,
    names: Sequence[str],
    child: Arm,
    plans: Mapping[str, Mapping[str, MethodConfig]],
    target: Path,
    prepare: Path,
    context: StageContext,
) -> dict[str, Any]:
    """Return `arms` and `arms_measured` of `compression.json`; no arms where there is no text to measure on.

    Args:
        config: the child's configuration.
        walker: walks the parent.
        names: the compressed layers.
        child: what made the child.
        plans: other allocations in place of the child's, by name; empty where nothing was allocated.
        target: the child's model folder.
        prepare: folder of the prepare artifact.
        context: takes the progress.
    """
    number, parent, device = config.arms_documents, walker.model, walker.device
    text = quick_eval.build(prepare, number, parent, device, end="first") if number else None
    if text is None:
        return {"arms": {}}
    if walker.tokens_NT is None:
        masked = meta_init.is_encoder(walker.model)
        tokens_NT = calibration.sample_tokens(prepare, samples=config.samples, seed=config.seed, masked=masked)
        walker = replace(walker, tokens_NT=tokens_NT)
    made: dict[str, Any] = {}
    for name, row, total in compare(walker, names, child, plans, target, text):
        made[name] = row
        interval = intervals.Interval(**row["ratio"])
        message = f"{name}: {interval} of the parent's bits per byte with {row['bytes']:,} bytes"
        context.report(Progress(context.node, len(made), total, "arms", message))
    measured = {"split": "validation", "documents": text.documents, "scored_tokens": text.scored}
    return {"arms": made, "arms_measured": measured}


def compare(
    walker: Walker,
    names: Sequence[str],
    child: Arm,
    plans: Mapping[str, Mapping[str, MethodConfig]],
    target: Path,
    text: Yardstick,
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yield (name, {"ratio", "bytes"}, how many come) of the child and each arm; bytes are of the compressed layers."""
    base = text.nats(load_model(walker.folder), "the parent")
    reader = WeightReader(target)
    stored = sum(reader.packed(name).stored_bits() for name in names) // 8

    def row(nats: Floats, size: int) -> dict[str, Any]:
        return {**text.against(nats, base), "bytes": size}

    arms = list(plan(walker, names, child, plans, stored))
    yield child.name, row(text.nats(load_model(target), child.name), stored), 1 + len(arms)
    for arm in arms:
        model = load_model(walker.folder)
        size = sum(put(model, block) for block in walker.walk(arm.method, arm.config, names, arm.plan))
        yield arm.name, row(text.nats(model, arm.name), size), 1 + len(arms)


def plan(
    walker: Walker,
    names: Sequence[str],
    child: Arm,
    plans: Mapping[str, Mapping[str, MethodConfig]],
    stored: int,
) -> Iterator[Arm]:
    """Yield the arms of a child: those on an integer grid, where one is large enough, and its method's null arms."""
    shapes = [tuple(walker.model.get_parameter(f"{name}.weight").shape) for name in names]
    fitting, taken = nearest_grid(shapes, stored), {child.name}
    if fitting is not None:
        plain: dict[str, WeightMethod[Any]] = {"rtn": rtn.Method(), "gptq": gptq.Method()}
        for name, method in plain.items():
            if name not in taken:
                yield Arm(name, method, method.Config.model_validate(fitting))
        taken |= {"rtn", "gptq"}
    for name, other in plans.items():
        yield Arm(name, child.method, child.config, other)
    for name in _null_names(walker, names, child):
        if name not in taken:
            yield Arm(name, _Baseline(child.method, name), child.config, child.plan)


def put(model: PreTrainedModel, block: Mapping[str, Any]) -> int:
    """Put the compressed layers of a block into a model; returns their stored bytes."""
    for name, layer in block.items():
        packed_linear.put(model, name, layer.packed)
    return sum(layer.packed.stored_bits() for layer in block.values()) // 8


def nearest_grid(shapes: Sequence[Sequence[int]], stored: int) -> dict[str, Any] | None:
    """Return the keys of the smallest integer grid that takes at least `stored` bytes; None where none does."""
    sizes = {
        (sum(grid_bytes(rows, columns, bits, group) for rows, columns in shapes), -bits, group)
        for bits, group in itertools.product(range(2, 9), _GROUPS)
    }
    large = [found for found in sizes if found[0] >= stored]
    if not large:
        return None
    _, negative, group = min(large)
    return {"bits": -negative, "group_size": group}


def grid_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Return the stored bytes of a matrix on a symmetric grid: codes, bfloat16 scales, shape."""
    words = -(-columns * bits // 32)
    return rows * (4 * words + 2 * columns // group_for(columns, group_size)) + 16


def _null_names(walker: Walker, names: Sequence[str], child: Arm) -> list[str]:
    """Return the names of the method's null arms, as it gives them for the first layer."""
    if child.method.not_informative:
        return []
    first = next(iter(walker.walk(child.method, child.config, names[:1], child.plan)))
    return sorted(first[names[0]].null)


class _Baseline(WeightMethod[Any]):
    """A method that stores one baseline of another."""

    def __init__(self, method: WeightMethod[Any], name: str) -> None:
        self._method, self._baseline = method, name

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: MethodConfig) -> Packed:
        return self._method.baselines(weight_OI, statistics, config)[self._baseline]

    def restore(self, tensors: Mapping[str, Tensor], config: MethodConfig) -> Packed:
        return self._method.restore(tensors, config)
