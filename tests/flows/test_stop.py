"""A run that is asked to stop at any moment of its life ends with 75 and leaves nothing; the same command goes on."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flows.run_record import Runs

CHECKOUT = Path(__file__).resolve().parents[2]
Ingot = Callable[..., subprocess.CompletedProcess[str]]
Environment = Callable[[Path], dict[str, str]]
RUN = ("run", "--recipe", "smoke", "--only", "promote", "--force", "promote")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EVERY_TIME = [
    ("import", "pydantic", 1),  # the command line itself
    ("import", "prefect.flow_engine", 1),
    ("open", ".run.json.", 2),  # the record exists
]
FULL = [
    ("import", "typer", 1),
    ("import", "flows.planner", 1),
    ("import", "numpy", 1),
    ("import", "prefect", 1),
    ("import", "httpx", 1),
    ("import", "prefect.task_engine", 1),
    ("open", ".run.json.", 1),
    ("open", ".run.json.", 3),
    ("open", ".run.json.", 4),
    ("import", "pipelines.tracking.session", 1),
    ("import", "sqlalchemy", 1),
    ("import", "mlflow", 1),
    ("import", "mlflow.tracking.client", 1),
    ("open", "manifest.json", 1),
    ("open", "manifest.json", 8),
    ("open", "history.jsonl", 2),
    ("import", "pipelines.report", 1),  # the run is closed
    ("open", "report.html", 1),
]


def stopped_at(moment: tuple[str, str, int], store: Path, environment: dict[str, str], signum: str = "SIGTERM") -> None:
    event, text, nth = moment
    before = {run.id for run in Runs(store).all()}
    driver = [sys.executable, str(Path(__file__).with_name("signal_at.py")), signum, event, text, str(nth)]
    environment = environment | {"PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([*driver, *RUN], cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 75, (moment, done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, (moment, done.stderr)
    assert signum in done.stderr, (moment, done.stderr)
    assert [" ".join(p.cmdline()) for p in psutil.process_iter() if _belongs(p, store)] == [], moment
    assert list((store / "leases").rglob("*.holder")) == [], moment
    assert list((store / "runs").rglob("*.tmp")) == [], moment
    for run in Runs(store).all():
        if run.id not in before:
            assert run.status in {"preempted", "done"}, (moment, run.status, run.error)


def _belongs(process: psutil.Process, store: Path) -> bool:
    try:
        return process.pid != os.getpid() and any(str(store) in part for part in process.cmdline())
    except psutil.Error:
        return False  # it ended while it was looked at


def copied(smoke_store: Path, folder: Path) -> Path:
    shutil.copytree(smoke_store, folder / "store")
    return folder / "store"


def test_sigterm_is_never_lost(smoke_store: Path, tmp_path: Path, environment_of: Environment, run_in: Ingot) -> None:
    store = copied(smoke_store, tmp_path)
    for moment in EVERY_TIME:
        stopped_at(moment, store, environment_of(store))
    assert "Champion of ingot-smoke" in run_in(store, "resume").stdout


@pytest.mark.faults_full
@pytest.mark.parametrize("signum", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_no_signal_is_lost_at_any_moment(
    smoke_store: Path, tmp_path: Path, environment_of: Environment, run_in: Ingot, signum: str
) -> None:
    store = copied(smoke_store, tmp_path)
    for moment in (*EVERY_TIME, *FULL):
        stopped_at(moment, store, environment_of(store), signum)
    assert "Champion of ingot-smoke" in run_in(store, *RUN).stdout


@pytest.mark.parametrize("controlling", [True, False], ids=["closed", "disowned"])
def test_a_closed_terminal_ends_a_run_as_preempted_and_a_disowned_run_goes_on(
    smoke_store: Path, tmp_path: Path, environment_of: Environment, controlling: bool
) -> None:
    """The kernel hangs up on the process whose controlling terminal it is; for others, writing fails."""
    store = copied(smoke_store, tmp_path)
    known = len(Runs(store).all())
    keyboard, screen = pty.openpty()
    take_terminal = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" if controlling else ""
    code = f"{take_terminal}from flows.__main__ import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *RUN],
        cwd=CHECKOUT, env=environment_of(store), stdin=screen, stdout=screen, stderr=screen, start_new_session=True,
    )  # fmt: skip
    os.close(screen)
    try:
        deadline = time.monotonic() + 120
        while len(Runs(store).all()) == known:
            assert process.poll() is None, os.read(keyboard, 1 << 16).decode()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.close(keyboard)
    code_ = process.wait(120)
    record = Runs(store).get()
    assert (code_, record.status) == ((75, "preempted") if controlling else (0, "done")), record.error
