"""`ingot doctor`: what stands in a report of a fault, and what must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.commands import doctor
from pipelines.core import machine
from pipelines.core.errors import ConfigError


def test_outside_of_a_project_the_machine_is_described_and_the_project_is_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("INGOT_PROJECT", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@mlflow.example")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct-horse")
    monkeypatch.setenv("PREFECT_API_KEY", "pnu_battery_staple")
    monkeypatch.chdir(tmp_path)
    machine.gpus_here.cache_clear()
    with pytest.raises(ConfigError, match=r"not ready: .*project"):
        doctor.doctor(as_json=True)
    machine.gpus_here.cache_clear()
    text = capsys.readouterr().out
    rows = {row["check"]: row for row in json.loads(text)}
    assert (rows["project"]["state"], rows["project"]["value"]) == ("missing", "none here")
    assert "ingot new" in rows["project"]["do"]
    assert rows["gpu"]["value"] == "none"
    assert all(rows[check]["value"] for check in ("platform", "python", "torch", "memory", "disk"))
    assert "mlflow.example" in rows["environment"]["value"]
    assert [secret for secret in ("hunter2", "correct-horse", "battery_staple") if secret in text] == []
