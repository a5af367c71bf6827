"""Metric points: every number of a measurement, its true step, and nothing that is not a number."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.tracking.points import Point, fit_key, points_of, read_metrics


def test_nested_numbers_get_keys_with_slashes() -> None:
    points = points_of({"loss": 2, "trust": {"embed": 0.5}, "note": "x", "flag": True}, step=7, timestamp_ms=9)
    assert points == [Point("loss", 2.0, 7, 9), Point("trust/embed", 0.5, 7, 9)]


def test_the_step_and_the_time_of_a_line_are_no_metrics() -> None:
    assert points_of({"step": 3, "time": 1.5, "lr": 0.1}, step=3, timestamp_ms=0) == [Point("lr", 0.1, 3, 0)]


def test_a_file_is_read_line_by_line_with_its_own_times(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 3.0, "time": 12.5}, {"step": 2, "val/loss": 2.5}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [Point("loss", 3.0, 1, 12_500), Point("val/loss", 2.5, 2, 77)]
    assert list(read_metrics(path, timestamp_ms=77)) == expected


def test_keys_fit_mlflow() -> None:
    assert fit_key("time/step%?") == "time/step__"
    assert len(fit_key("k" * 999)) == 250
