"""Compression in the report: every variant by method and bits, against its own base and the baselines at its bytes.

The picture shows the ratio of bits per byte to the base's, whose paired interval tells two models apart, where the
interval of the bits per byte themselves only tells how hard the documents are.

Where attention caches count, a size is the bytes on disk and those of a cache: a variant of a `kv_cache` method saves
nothing on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from pipelines.compression.report import CompressionReport
from pipelines.core import quantity
from pipelines.core.artifact import Artifact
from pipelines.modelio import load_instructions
from pipelines.report import pareto
from pipelines.report.charts import Axis

Facts = dict[str, Any]
_COMPRESS = "compress."
CACHE_TOKENS = 4096
"""Tokens whose cache counts where a variant codes its cache and the recipe names no number."""


def counted_tokens(record: Mapping[str, Any], artifacts: Mapping[str, Artifact]) -> int:
    """Return the tokens of a run whose attention cache counts as part of a model's size.

    `promote.cache_tokens`, as at the gate; where that is 0 and a variant codes its cache, `CACHE_TOKENS`, else none.
    """
    promote = (record.get("config") or {}).get("promote") or {}
    coded = any(node.startswith(_COMPRESS) and load_instructions.of(found).cache for node, found in artifacts.items())
    return int(promote.get("cache_tokens") or (CACHE_TOKENS if coded else 0))


def footprint(row: Mapping[str, Any], cache_tokens: int) -> float:
    """Return the bytes of a model on disk and of its attention cache for so many tokens."""
    return float(row["size_bytes"] + cache_tokens * (row.get("cache_bytes_per_token") or 0.0))


def size_axis(cache_tokens: int) -> Axis:
    """Return the axis of sizes, which says what counts."""
    counted = f" and of a cache of {cache_tokens:,} tokens" if cache_tokens else ""
    return Axis(f"bytes on disk{counted} (logarithmic)", log=True, text=quantity.size)


def rows(models: Sequence[Mapping[str, Any]], artifacts: Mapping[str, Artifact], cache_tokens: int = 0) -> list[Facts]:
    """Return one row per variant, from the smallest to the largest.

    Args:
        models: rows of `comparison.table`, the base's among them.
        artifacts: node name -> artifact.
        cache_tokens: tokens whose attention cache counts as part of a size.

    Returns:
        The variant's row of the comparison with `method`, `bits_per_weight`, `model_bits_per_weight`, `layer_bytes`,
        `baselines` (name -> `Measurement` on validation text), `compared_cache_bytes` (of the variant there),
        `cache_tokens`, `footprint_bytes` (disk and cache), `size_ratio`, `footprint_ratio`, `prefill_ratio`,
        `decode_ratio`, `memory_ratio` (to the base's) and `best`: no other variant is smaller and better.
    """
    base = next((row for row in models if row["kind"] == "base"), None)
    measured = {row["model"]: row for row in models if row["kind"] == "variant"}
    found = []
    for node, artifact in artifacts.items():
        name = node.removeprefix(_COMPRESS)
        if node.startswith(_COMPRESS) and name in measured:
            report = CompressionReport.read(artifact.path)
            found.append({**measured[name], **_stored(report), **_versus(measured[name], base, cache_tokens)})
    best = pareto.frontier([_point(row) for row in found])
    return sorted(({**row, "best": row["model"] in best} for row in found), key=lambda row: row["footprint_bytes"])


def picture(variants: Sequence[Mapping[str, Any]], candidate: str | None = None) -> str:
    """Return the picture: variants of one method joined in order of size, baselines as marks; empty without any."""
    shown = [row for row in variants if row["ratio"] is not None]
    if not shown:
        return ""
    by_method = sorted(shown, key=lambda row: (row["method"], row["footprint_bytes"]))
    joined = [[_point(row) for row in group] for _, group in groupby(by_method, key=lambda row: row["method"])]
    baselines = [
        pareto.Model(
            f"{name} for {row['model']}",
            _size_with(baseline, row),
            *_interval(baseline["ratio"]),
            kind=name,
            beside=row["ratio"],
        )
        for row in shown
        for name, baseline in sorted(row["baselines"].items())
    ]
    models = [_point(row, candidate) for row in shown]
    x, y = size_axis(shown[0]["cache_tokens"]), Axis("bits per byte, ratio to the base")
    return pareto.draw(models, [("base", 1.0)], x, y, "Size against quality lost", joined=joined, baselines=baselines)


def _size_with(baseline: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """Return the size of a variant whose compressed layers, or cache, took a baseline's bytes instead of their own."""
    size: float = row["footprint_bytes"]
    if "cache_bytes_per_token" in baseline:
        return size + row["cache_tokens"] * (baseline["cache_bytes_per_token"] - row["compared_cache_bytes"])
    return size + baseline["bytes"] - (row["layer_bytes"] or baseline["bytes"])


def _stored(report: CompressionReport) -> Facts:
    told, comparison = report.to_json(), report.comparison
    return {
        "method": report.method,
        "bits_per_weight": report.totals.bits_per_weight,
        "model_bits_per_weight": report.totals.model_bits_per_weight,
        "bits_per_cached_number": report.totals.bits_per_cached_number,
        "layer_bytes": report.totals.layer_bytes,
        "loads_with": report.loads_with,
        "not_informative": report.not_informative,
        "baselines": told["comparison"]["baselines"] if comparison else {},
        "compared_cache_bytes": comparison.variant.cache_bytes_per_token if comparison else None,
        "search": told.get("search"),
    }


def _versus(variant: Mapping[str, Any], base: Mapping[str, Any] | None, cache_tokens: int) -> Facts:
    def ratio(key: str) -> float | None:
        before = base[key] if base else None
        return variant[key] / before if before and variant[key] is not None else None

    size = footprint(variant, cache_tokens)
    return {
        "cache_tokens": cache_tokens,
        "footprint_bytes": size,
        "footprint_ratio": size / footprint(base, cache_tokens) if base else None,
        "size_ratio": ratio("size_bytes"),
        "prefill_ratio": ratio("prefill_ms"),
        "decode_ratio": ratio("decode_ms"),
        "memory_ratio": ratio("peak_memory_bytes"),
    }


def _point(row: Mapping[str, Any], candidate: str | None = None) -> pareto.Model:
    value = {"value": row["ratio"], "low": row["ratio_low"], "high": row["ratio_high"]}
    return pareto.Model(row["model"], row["footprint_bytes"], *_interval(value), chosen=row["model"] == candidate)


def _interval(ratio: Mapping[str, float | None]) -> tuple[float, float, float]:
    """Return value, low and high, NaN where there is none."""
    found = (ratio[key] for key in ("value", "low", "high"))
    value, low, high = (float("nan") if number is None else number for number in found)
    return value, low, high
