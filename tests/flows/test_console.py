"""What a run prints: tables, JSON, durations, sizes, progress that does not flood a log."""

from __future__ import annotations

import json

import pytest

from flows import console
from pipelines.core.stage import Progress


@pytest.fixture(autouse=True)
def _loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_last", {})
    console.set_quiet(False)


def test_a_table_lines_up_and_marks_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(
        [{"name": "a", "bits": 1.23456}, {"name": "long name", "bits": None}], ["name", "bits"], as_json=False
    )
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.index("bits") == first.index("1.235") == second.index("-")


def test_json_has_every_key_not_only_the_columns(capsys: pytest.CaptureFixture[str]) -> None:
    console.table([{"name": "a", "extra": [1]}], ["name"], as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"name": "a", "extra": [1]}]


def test_an_empty_table_still_has_a_head(capsys: pytest.CaptureFixture[str]) -> None:
    console.table([], ["name"], as_json=False)
    assert capsys.readouterr().out == "  name\n"


def test_progress_in_a_log_is_a_line_at_the_start_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    for done in range(1, 101):
        console.progress_line(Progress("pretrain", done, 100, "steps", f"loss {done}"))
    lines = capsys.readouterr().err.splitlines()
    assert "1/100 steps" in lines[0]
    assert "100/100 steps  loss 100" in lines[-1]
    assert len(lines) < 5


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_quiet(True)
    console.progress_line(Progress("pretrain", 1, 1, "steps"))
    console.say("news")
    assert capsys.readouterr().err == ""
