"""What the tracking tests share: artifacts with a metrics file, and a reader of MLflow's history."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.core import artifact, provenance
from pipelines.core.artifact import Artifact

History = dict[str, list[tuple[int, float]]]


@pytest.fixture
def publish(store_root: Path) -> Callable[..., Artifact]:
    """Return a function that publishes a pretrain artifact with the given metric rows."""

    def make(rows: list[dict[str, Any]], name: str = "a", summary: dict[str, Any] | None = None) -> Artifact:
        build = store_root / f"build-{name}"
        build.mkdir()
        (build / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return artifact.publish(
            build,
            store_root / "artifacts" / "pretrain" / name,
            stage="pretrain",
            node="pretrain",
            identity={"name": name},
            parents={},
            summary=summary or {"final": {"loss": 1.5}, "family": "decoder"},
            provenance=provenance.capture(duration_s=1.0, source_digest="0" * 64, data_hash=None),
            observations=("metrics.jsonl",),
        )

    return make


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Twenty steps as training logs them."""
    return [
        {"step": s, "tokens": 512 * s, "loss": 9.0 / s, "lr": 1e-3, "trust": {"embed": 0.1 * s}} for s in range(1, 21)
    ]


@pytest.fixture
def history_of() -> Callable[[Any, str], History]:
    """Return a function that reads every metric of an MLflow run as sorted (step, value)."""

    def read(client: Any, run_id: str) -> History:
        names = client.get_run(run_id).data.metrics
        return {n: sorted((m.step, m.value) for m in client.get_metric_history(run_id, n)) for n in names}

    return read


@pytest.fixture
def expected() -> Callable[[list[dict[str, Any]]], History]:
    """Return a function that states the history that a metrics file stands for, the obvious way."""

    def state(rows: list[dict[str, Any]]) -> History:
        return {
            "tokens": [(r["step"], r["tokens"]) for r in rows],
            "loss": [(r["step"], r["loss"]) for r in rows],
            "lr": [(r["step"], r["lr"]) for r in rows],
            "trust/embed": [(r["step"], r["trust"]["embed"]) for r in rows],
        }

    return state
