"""What a variant is compared with at equal stored bytes, and the one way of all drivers to compare.

Measured on validation documents, as bits per byte over the base's, with intervals over documents. An integer grid is
never smaller than the variant: the one whose bytes are nearest from above is taken, and the bytes of every baseline are
recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from models.compression.base import MethodConfig, Needs, Packed, Statistics, WeightMethod
from models.compression.formats.int_grid import group_for
from pipelines.compression.quick_eval import Floats, QuickEval
from pipelines.compression.report import Comparison, Measurement
from pipelines.compression.run import CompressionRun
from pipelines.measure.intervals import bootstrap, paired_ratio

_GROUPS = (0, 256, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Contender:
    """One model of a comparison, as it was measured."""

    name: str
    nats_D: Floats
    """Of each document."""
    bytes: int | None = None
    """Of the compressed layers."""
    cache_bytes_per_token: float | None = None


def compare(
    run: CompressionRun,
    text: QuickEval,
    contenders: Iterable[Contender],
    *,
    count: int,
    left_out: Mapping[str, str] | None = None,
) -> Comparison:
    """Return what the base, the variant and each baseline measured on the same documents.

    Args:
        run: takes the progress.
        text: what was scored.
        contenders: the base, the variant, then the baselines.
        count: how many variants and baselines there are.
        left_out: baselines of other kinds that say nothing here -> why.
    """
    nats: dict[str, Floats] = {}
    measured: dict[str, Measurement] = {}
    for contender in contenders:
        nats[contender.name] = contender.nats_D
        if len(nats) == 1:
            continue
        base_D, variant_D = itertools.islice(nats.values(), 2)
        measured[contender.name] = row = _measurement(text, base_D, variant_D, contender)
        size = f"{row.bytes:,} bytes" if row.bytes else f"{row.cache_bytes_per_token:,.1f} bytes of cache a token"
        message = f"{contender.name}: {row.ratio} of the base's bits per byte with {size}"
        run.progress(len(measured), count, "comparisons", message)
    variant, *baselines = measured
    base_D = next(iter(nats.values()))
    return Comparison(
        split="validation",
        unit="documents",
        items=text.documents,
        scored_tokens=int(text.tokens_D.sum()),
        base_nats_per_token=bootstrap(lambda n, t: n / t, (base_D, text.tokens_D.astype(np.float64))),
        variant=measured[variant],
        baselines={name: measured[name] for name in baselines},
        left_out=dict(left_out or {}),
    )


def _measurement(text: QuickEval, base_D: Floats, variant_D: Floats, contender: Contender) -> Measurement:
    nats_D = contender.nats_D
    ones_D, columns = np.ones_like(base_D), (nats_D, base_D, text.tokens_D.astype(np.float64))
    return Measurement(
        ratio=paired_ratio(nats_D, base_D, ones_D),
        versus_variant=paired_ratio(nats_D, variant_D, ones_D),
        nats_per_token=bootstrap(lambda n, _, t: n / t, columns),
        perplexity_ratio=bootstrap(lambda n, b, t: np.exp((n - b) / t), columns),
        bytes=contender.bytes,
        cache_bytes_per_token=contender.cache_bytes_per_token,
    )


# ---- baselines of weights ---------------------------------------------------------------------------------------


class BaselineMethod(WeightMethod[Any]):
    """A method that stores what another one names as its baseline, in place of its result."""

    def __init__(self, method: WeightMethod[Any], baseline: str) -> None:
        self._method, self._baseline = method, baseline

    def needs(self, config: MethodConfig) -> Needs:
        """Return what the method itself needs."""
        return self._method.needs(config)

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: MethodConfig) -> Packed:
        """Return the baseline."""
        return self._method.baselines(weight_OI, statistics, config)[self._baseline]

    def restore(self, tensors: Mapping[str, Tensor], config: MethodConfig) -> Packed:
        """Rebuild what the method itself stores: a baseline has its storage."""
        return self._method.restore(tensors, config)


def nearest_grid(shapes: Sequence[Sequence[int]], stored: int) -> dict[str, Any] | None:
    """Return the keys of the smallest integer grid that takes at least `stored` bytes; None where none does."""
    sizes = {
        (sum(grid_bytes(rows, columns, bits, group) for rows, columns in shapes), -bits, group)
        for bits, group in itertools.product(range(2, 9), _GROUPS)
    }
    large = [grid for grid in sizes if grid[0] >= stored]
    if not large:
        return None
    _, negative, group = min(large)
    return {"bits": -negative, "group_size": group}


def grid_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Return the stored bytes of a matrix on a symmetric grid: codes, bfloat16 scales, shape."""
    words = -(-columns * bits // 32)
    return rows * (4 * words + 2 * columns // group_for(columns, group_size)) + 16
