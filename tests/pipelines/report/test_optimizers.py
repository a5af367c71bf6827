"""The comparison of optimizers: who is said to be better, and when nobody is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.core.artifact import Artifact
from pipelines.report import sections, write
from tests.pipelines.report.conftest import evaluation, publish


def compared(tmp_path: Path, artifacts: dict[str, Artifact], record: dict[str, Any], ratio: float) -> dict[str, Any]:
    """Give the run an AdamW baseline whose bits per byte are `ratio` of the model's, and return what the page says."""
    curve = [{"step": s, "tokens": 512 * s, "loss": 7.0 - s / 10} for s in range(1, 6)]
    artifacts["pretrain.adamw"] = publish(tmp_path, "pretrain.adamw", {"metrics.jsonl": curve})
    measured = evaluation(2.0 * ratio, 4_000_000, ratio, {})
    artifacts["compare.adamw"] = publish(tmp_path, "compare.adamw", {"evaluation.json": measured})
    record["config"]["pretrain"]["optimizer"] = {"name": "lamb", "lr": 0.015}
    record["config"]["baselines"] = [{"name": "adamw", "optimizer": {"name": "adamw", "lr": None}}]
    found = sections.page(record, artifacts)["optimizers"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (1.05, "Here lamb at 0.015 is better than adamw at 0.003,"),
        (0.95, "Here adamw at 0.003 is better than lamb at 0.015,"),
        (1.005, "lamb at 0.015 and adamw at 0.003 do not differ beyond"),
    ],
)
def test_the_better_optimizer_is_named_only_beyond_the_interval(
    tmp_path: Path, artifacts: dict[str, Artifact], record: dict[str, Any], ratio: float, verdict: str
) -> None:
    found = compared(tmp_path, artifacts, record, ratio)
    assert found["verdict"].startswith(verdict)
    assert [row["ratio"] for row in found["rows"]] == [None, ratio]


def test_the_page_shows_the_baseline_and_keeps_it_out_of_the_models(
    tmp_path: Path, artifacts: dict[str, Artifact], record: dict[str, Any]
) -> None:
    compared(tmp_path, artifacts, record, 1.05)
    write(record, artifacts, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Optimizers at equal tokens" in page
    assert "adamw" in page
    assert "adamw" not in [row["model"] for row in sections.page(record, artifacts)["evaluation"]["rows"]]


def test_a_run_without_baselines_has_no_such_part(artifacts: dict[str, Artifact], record: dict[str, Any]) -> None:
    assert sections.page(record, artifacts)["optimizers"] is None
