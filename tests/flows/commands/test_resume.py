"""`ingot resume` goes on with exactly the runs of which `ingot status` says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.commands import run as run_command
from flows.commands import show as show_command
from flows.run_record import Runs
from pipelines.core.errors import ConfigError


@pytest.mark.parametrize("status", ["done", "refused"])
def test_a_run_that_came_to_its_end_is_not_gone_on_with(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INGOT_STORE", str(tmp_path))
    runs = Runs(tmp_path)
    record = runs.start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes={})
    runs.finish(record, status, 0)
    show_command.status(None, as_json=False)
    assert "ingot resume" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="there is no unfinished run"):
        run_command.resume(None, as_json=False, quiet=True)
    with pytest.raises(ConfigError, match=f"{record.id} is finished"):
        run_command.resume(record.id, as_json=False, quiet=True)


def test_a_run_at_work_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_STORE", str(tmp_path))
    record = Runs(tmp_path).start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes={})
    with pytest.raises(ConfigError, match=f"{record.id} is at work \\(process"):
        run_command.resume(record.id, as_json=False, quiet=True)
    with pytest.raises(ConfigError, match="there is no unfinished run"):
        run_command.resume(None, as_json=False, quiet=True)


def test_status_offers_to_go_on_with_a_run_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INGOT_STORE", str(tmp_path))
    runs = Runs(tmp_path)
    record = runs.start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes={})
    runs.finish(record, "failed", 4)
    show_command.status(None, as_json=False)
    assert f"Go on with: ingot resume {record.id}" in capsys.readouterr().out
