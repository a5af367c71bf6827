"""Metric points: what `metrics.jsonl` and live progress say, in the form that MLflow keeps. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.tracking.params import KEY_LIMIT, UNFIT

STEP = "step"
TIME = "time"
"""The field of a line that holds its wall-clock time (seconds since 1970), if it has one."""


_HEADLINES = {
    "pretrain": {
        "validation_loss": "train/validation_loss",
        "tokens": "train/tokens",
        "tokens_per_s": "train/tokens_per_s",
    },
    "evaluate": {"bits_per_byte": "bits_per_byte", "ratio": "ratio_to_base"},
    "compare": {"bits_per_byte": "baseline/bits_per_byte", "ratio": "baseline/ratio_to_base"},
    "promote": {"bits_per_byte": "champion/bits_per_byte", "size_bytes": "champion/size_bytes"},
}
"""First word of a node's name -> key of its summary -> name in the run that it belongs to."""


@dataclass(frozen=True)
class Point:
    """One value of one metric."""

    key: str
    value: float
    step: int
    timestamp_ms: int


def points_of(values: Mapping[str, Any], *, step: int, timestamp_ms: int) -> list[Point]:
    """Return the numbers of one measurement; nested mappings get keys with slashes, other values are left out."""
    return [Point(fit_key(key), value, step, timestamp_ms) for key, value in numbers(values) if key not in {STEP, TIME}]


def read_metrics(path: Path, *, timestamp_ms: int) -> Iterator[Point]:
    """Yield every point of a `metrics.jsonl`, in its order.

    Args:
        path: the file; each line an object with `step` and numbers.
        timestamp_ms: used for lines that carry no time of their own.
    """
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            moment = row.get(TIME)
            stamp = int(moment * 1000) if isinstance(moment, int | float) else timestamp_ms
            yield from points_of(row, step=int(row[STEP]), timestamp_ms=stamp)


def numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield (key, number) for every number in a nested mapping, NaN and infinities included; truth values are not."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from numbers(value, f"{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, float(value)


def headline(node: str, summary: Mapping[str, Any]) -> dict[str, float]:
    """Return what a finished node adds to the overview of its run: few numbers, named by quantity and then by model.

    MLflow's list of runs sorts metrics by name, so one quantity of all models stands together. Everything else stands
    in the run of the node.
    """
    stage, _, model = node.partition(".")
    known = dict(numbers(summary))
    return {
        f"{quantity}/{model}" if model else quantity: known[key]
        for key, quantity in _HEADLINES.get(stage, {}).items()
        if key in known
    }


def fit_key(key: str) -> str:
    """Return a key with only the characters that MLflow accepts, cut to its limit."""
    return UNFIT.sub("_", key)[:KEY_LIMIT]
