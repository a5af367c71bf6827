"""How a run is closed: its status, exit code and error for every way to end, and what a signal meanwhile changes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flows import prefect_client, runner, train_to_registry
from flows.planner import Selection
from flows.run_record import NodeRecord, Runs
from flows.runner import Execution
from pipelines.core import stop
from pipelines.core.errors import GateRefused, IngotError, IntegrityError, NumericError, Preempted

CHECKOUT = Path(__file__).resolve().parents[2]


class Session:
    """A tracking session that lacks a part."""

    uri, url, pending, problem = "sqlite:///x", None, True, "MLflow does not answer"

    def __init__(self) -> None:
        self.closed: list[str] = []

    def close(self, status: str) -> None:
        """Take note."""
        self.closed.append(status)


class Closing(Execution):
    """An execution whose report can be watched."""

    reports = 0
    on_report: Callable[[], None] = staticmethod(lambda: None)  # type: ignore[assignment]

    def report(self) -> Path:
        """Count, and do what the test says."""
        self.reports += 1
        self.on_report()
        return Path()


@pytest.fixture
def execution(tmp_path: Path) -> Closing:
    """A run that has begun."""
    runs = Runs(tmp_path)
    nodes = {"prepare": NodeRecord(stage="prepare", fingerprint="f")}
    record = runs.start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes=nodes)
    nothing = cast("Any", None)
    return Closing(nothing, runs, record, cast("Any", Session()), nothing, nothing)


def end(execution: Execution, error: BaseException | None) -> None:
    """Close a run around an error, which must come out again."""
    if error is None:
        with runner.closing(execution):
            pass
        return
    with pytest.raises(type(error)) as caught, runner.closing(execution):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "status", "code", "message", "reports"),
    [
        (None, "done", 0, None, 1),
        (GateRefused("worse"), "refused", 7, "worse", 1),
        (Preempted("stopped by SIGTERM"), "preempted", 75, "stopped by SIGTERM", 0),
        (stop.StopRequested("stopped by SIGINT"), "preempted", 75, "a signal asked the run to stop", 0),
        (NumericError("nan", hint="lower it"), "failed", 5, "nan\n  -> lower it", 0),
        (IntegrityError("damaged"), "failed", 3, "damaged", 0),
        (ValueError("odd"), "failed", 1, "ValueError('odd')", 0),
        (SystemExit(9), "failed", 1, "SystemExit(9)", 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_run_is_on_record_as_it_ended(
    execution: Closing, error: BaseException | None, status: str, code: int, message: str | None, reports: int
) -> None:
    end(execution, error)
    stored = execution.runs.get(execution.record.id)
    assert (stored.status, stored.exit_code, stored.error) == (status, code, message)
    assert stored.finished_at is not None
    assert not stored.at_work
    assert execution.reports == reports
    assert cast("Any", execution.session).closed == [status]
    assert (stored.tracking_pending, stored.tracking_problem) == (True, "MLflow does not answer")


def test_an_error_of_a_library_that_is_known_has_the_exit_code_of_ours(execution: Closing, tmp_path: Path) -> None:
    end(execution, PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "locked")))
    stored = execution.runs.get(execution.record.id)
    assert stored.exit_code not in {0, 1, None}
    assert str(tmp_path / "locked") in (stored.error or "")


def test_a_report_that_cannot_be_written_leaves_no_session_open_and_a_whole_record(execution: Closing) -> None:
    def fails() -> None:
        raise IngotError("no report")

    execution.on_report = fails
    with pytest.raises(IngotError, match="no report"), runner.closing(execution):
        pass
    stored = execution.runs.get(execution.record.id)
    assert (stored.status, stored.exit_code, stored.tracking_pending) == ("done", 0, True)
    assert cast("Any", execution.session).closed == ["done"]


def test_no_secret_of_an_error_is_on_record(execution: Closing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_PASSWORD", "c4n4ry-Zq81")
    execution.failed("prepare", IngotError("the server said c4n4ry-Zq81"))
    end(execution, IngotError("the server said c4n4ry-Zq81"))
    record = execution.runs.folder(execution.record.id) / "run.json"
    assert json.loads(record.read_text())["nodes"]["prepare"]["message"] == "the server said ***"
    assert json.loads(record.read_text())["error"] == "the server said ***"
    assert "c4n4ry" not in record.read_text()


def test_prefect_is_told_no_secret_of_an_override(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(train_to_registry, "flow", lambda **_options: lambda _body: lambda *given: told.extend(given))
    monkeypatch.setattr(prefect_client, "tolerate", lambda: None)
    overrides = ("tracking.uri=postgresql://me:c4n4ry@db/x", "prepare.api_key=c4n4ry", "pretrain.steps=3")
    plan = SimpleNamespace(recipe="smoke", overrides=overrides, selection=Selection())
    train_to_registry.run_planned(cast("Any", plan), server="http://127.0.0.1:9/api")
    assert told[:2] == ["smoke", ["tracking.uri=postgresql://***@db/x", "prepare.api_key=***", "pretrain.steps=3"]]


PROGRAM = """
import os, sys, time
from pathlib import Path
from typing import Any
from pipelines.core import stop
stop.install()
from pipelines.core.errors import Preempted
from flows import runner
from flows.run_record import Runs

class Session:
    uri, url, pending, problem = "x", None, False, None
    def close(self, status): pass

class Closing(runner.Execution):
    def report(self):
        print("reporting", flush=True)
        while not stop.requested(): time.sleep(0.01)
        time.sleep(WAIT)
        print("reported", flush=True)

runs = Runs(Path(sys.argv[1]))
record = runs.start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes={})
execution = Closing(None, runs, record, Session(), None, None)
try:
    with stop.unwinding(), runner.closing(execution):
        if AT == "work":
            with stop.held():
                print("working", flush=True)
                while not stop.requested(): time.sleep(0.01)
                time.sleep(0.7)
                print("stopping", flush=True)
                time.sleep(60)
except Preempted as error:
    sys.exit(error.exit_code)
"""


def signalled(store: Path, at: str, wait_s: float, lines: list[str]) -> tuple[int, list[str]]:
    """Run `PROGRAM`, send SIGTERM after each of its `lines`; return its exit code and what it said besides."""
    code = textwrap.dedent(PROGRAM).replace("AT ==", f"{at!r} ==").replace("WAIT", str(wait_s))
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(store)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        for line in lines:
            assert process.stdout.readline().strip() == line
            process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
        return process.returncode, rest.split()
    finally:
        process.kill()
        process.wait()


def test_a_signal_while_the_run_is_closed_changes_nothing_of_how_it_ended(tmp_path: Path) -> None:
    assert signalled(tmp_path, "closing", 0.0, ["reporting"]) == (75, ["reported"])
    (stored,) = Runs(tmp_path).all()
    assert (stored.status, stored.exit_code, stored.at_work) == ("done", 0, False)


def test_a_second_signal_ends_a_run_at_work_as_preempted_on_record(tmp_path: Path) -> None:
    assert signalled(tmp_path, "work", 0.0, ["working", "stopping"]) == (75, [])
    (stored,) = Runs(tmp_path).all()
    assert (stored.status, stored.exit_code, stored.error) == ("preempted", 75, "ended by a second signal")


def test_a_second_signal_while_the_run_is_closed_leaves_its_status(tmp_path: Path) -> None:
    code = PROGRAM.replace('print("reported", flush=True)', 'print("again", flush=True); time.sleep(60)')
    program = code.replace("AT ==", "'closing' ==").replace("WAIT", "0.7")
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in ("reporting", "again"):
            assert process.stdout.readline().strip() == line
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75
    (stored,) = Runs(tmp_path).all()
    assert (stored.status, stored.exit_code) == ("done", 0)
