"""The training beside the same training with other optimizers, at equal tokens: a table, curves and a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.core import quantity
from pipelines.core.artifact import Artifact
from pipelines.measure import intervals
from pipelines.report import charts
from pipelines.report.charts import Axis, Series
from pipelines.training.optimizer_config import OptimizerConfig

Facts = dict[str, Any]


def compared(record: Mapping[str, Any], artifacts: Mapping[str, Artifact], curves: Sequence[Series]) -> Facts | None:
    """Return the model's training and its baselines by held-out text; None where no baseline was measured.

    Args:
        record: what `RunRecord.model_dump()` returns.
        artifacts: node name -> artifact.
        curves: losses by tokens of the model's training, then of the baselines in the order of the recipe.

    Returns:
        `rows` with optimizer, rate, validation loss (nats a token), bits per byte and its ratio to the model's with
        their intervals over documents; `verdict`, a sentence; `picture`, the curves.
    """
    config = record.get("config") or {}
    own, evaluated = artifacts.get("pretrain"), artifacts.get("evaluate.pretrain")
    measured = [each for each in config.get("baselines") or [] if f"compare.{each['name']}" in artifacts]
    if own is None or evaluated is None or not measured:
        return None
    rows = [_row("pretrain", config["pretrain"]["optimizer"], own, evaluated)]
    for baseline in measured:
        name = baseline["name"]
        trained, compared_with = artifacts[f"pretrain.{name}"], artifacts[f"compare.{name}"]
        rows.append(_row(name, baseline["optimizer"], trained, compared_with))
    picture = charts.lines(
        list(curves), Axis("tokens", text=quantity.short), Axis("loss, nats per token"), "Loss by tokens, by optimizer"
    )
    return {"rows": rows, "verdict": " ".join(_verdict(rows[0], row) for row in rows[1:]), "picture": picture}


def _row(name: str, optimizer: Mapping[str, Any], trained: Artifact, evaluated: Artifact) -> Facts:
    evaluation = intervals.read(evaluated.path)
    bits, versus = evaluation["bits_per_byte"], evaluation["versus_base"] or {}
    ratio = versus.get("bits_per_byte_ratio") or {}
    return {
        "name": name,
        "optimizer": optimizer["name"],
        "rate": OptimizerConfig.model_validate(optimizer).peak_lr,
        "validation_loss": trained.manifest.summary.get("validation_loss"),
        "bits_per_byte": bits["value"],
        "low": bits["low"],
        "high": bits["high"],
        "ratio": ratio.get("value"),
        "ratio_low": ratio.get("low"),
        "ratio_high": ratio.get("high"),
    }


def _verdict(own: Facts, other: Facts) -> str:
    """Say which of two optimizers is better on the held-out text, or that it does not tell."""
    first, second = (f"{row['optimizer']} at {row['rate']:g}" for row in (own, other))
    if other["ratio_low"] <= 1.0 <= other["ratio_high"]:
        return f"{first} and {second} do not differ beyond what the documents vary."
    better, worse = (first, second) if other["ratio_low"] > 1.0 else (second, first)
    return f"Here {better} is better than {worse}, on this text, with this seed and at these rates."
