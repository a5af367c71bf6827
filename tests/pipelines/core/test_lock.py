"""Leases with real processes: one at a time, dead holders block nobody, and the holder is named."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.core.errors import LockedError
from pipelines.core.lock import hold
from pipelines.core.processes import this_process

CHECKOUT = Path(__file__).resolve().parents[3]
DEADLINE_S = 60.0

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from pipelines.core.lock import hold
with hold(Path(sys.argv[2]), what="stage x"):
    print("held", flush=True)
    sys.stdin.readline()
"""

COUNT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from pipelines.core.lock import hold
root = Path(sys.argv[2])
for turn in range(int(sys.argv[3])):
    with hold(root / "x.lock", what="stage x", wait_s=60):
        os.mkdir(root / "inside")          # fails if another process is inside
        before = int((root / "count").read_text())
        (root / "count").write_text(str(before + 1))
        os.rmdir(root / "inside")
"""


def holder(lock: Path) -> subprocess.Popen[str]:
    """A process that holds the lease until its stdin closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(CHECKOUT), str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_held_lease_refuses_at_once_and_names_the_holder(tmp_path: Path) -> None:
    process = holder(tmp_path / "x.lock")
    started = time.monotonic()
    with (
        pytest.raises(LockedError, match=f"stage x is locked by process {process.pid} on {socket.gethostname()}"),
        hold(tmp_path / "x.lock", what="stage x", wait_s=0),
    ):
        pass
    assert time.monotonic() - started < 5
    process.communicate("\n", timeout=DEADLINE_S)
    with hold(tmp_path / "x.lock", what="stage x", wait_s=0):
        pass


def test_waiting_ends_with_the_refusal(tmp_path: Path) -> None:
    process = holder(tmp_path / "x.lock")
    started = time.monotonic()
    with pytest.raises(LockedError), hold(tmp_path / "x.lock", what="stage x", wait_s=0.5):
        pass
    assert time.monotonic() - started >= 0.5
    process.communicate("\n", timeout=DEADLINE_S)


def test_a_sigkilled_holder_blocks_nobody(tmp_path: Path) -> None:
    process = holder(tmp_path / "x.lock")
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    with hold(tmp_path / "x.lock", what="stage x", wait_s=0):
        pass


def test_a_stopped_holder_still_holds(tmp_path: Path) -> None:
    """The kernel's lock cannot be lost to a pause, so nothing can be published twice after one."""
    process = holder(tmp_path / "x.lock")
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(LockedError), hold(tmp_path / "x.lock", what="stage x", wait_s=0):
        pass
    process.send_signal(signal.SIGCONT)
    process.communicate("\n", timeout=DEADLINE_S)


def test_the_name_of_a_dead_holder_is_not_kept(tmp_path: Path) -> None:
    process = holder(tmp_path / "x.lock")
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    with hold(tmp_path / "x.lock", what="stage x", wait_s=0):
        assert f'"pid":{os.getpid()}' in (tmp_path / "x.holder").read_text()
    assert not (tmp_path / "x.holder").exists()


def test_a_process_that_got_the_id_of_a_dead_holder_is_not_accused(tmp_path: Path) -> None:
    """The holder writes its name just after it takes the lock; until then the name is that of the one before."""
    process = holder(tmp_path / "x.lock")
    reused = this_process().model_copy(update={"start": "another boot:1"})
    (tmp_path / "x.holder").write_text(reused.model_dump_json())
    with (
        pytest.raises(LockedError, match="stage x is locked by another process"),
        hold(tmp_path / "x.lock", what="stage x", wait_s=0),
    ):
        pass
    process.communicate("\n", timeout=DEADLINE_S)


def test_a_lease_is_given_back_when_the_body_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="body"), hold(tmp_path / "x.lock", what="stage x"):
        raise RuntimeError("body")
    with hold(tmp_path / "x.lock", what="stage x", wait_s=0):
        pass


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    inside, entered = threading.Event(), []
    leave = threading.Event()

    def other() -> None:
        with hold(tmp_path / "x.lock", what="stage x"):
            inside.set()
            leave.wait(DEADLINE_S)
            entered.append("left")

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(DEADLINE_S)
    with pytest.raises(LockedError), hold(tmp_path / "x.lock", what="stage x", wait_s=0):
        pass
    leave.set()
    with hold(tmp_path / "x.lock", what="stage x", wait_s=DEADLINE_S):
        assert entered == ["left"]
    thread.join()


def test_four_processes_take_turns(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    crowd = [
        subprocess.Popen([sys.executable, "-c", COUNT, str(CHECKOUT), str(tmp_path), "5"]) for _process in range(4)
    ]
    assert [process.wait(timeout=DEADLINE_S) for process in crowd] == [0, 0, 0, 0]
    assert (tmp_path / "count").read_text() == "20"


def test_different_leases_do_not_meet(tmp_path: Path) -> None:
    with hold(tmp_path / "x.lock", what="x", wait_s=0), hold(tmp_path / "y.lock", what="y", wait_s=0):
        assert {path.name for path in tmp_path.glob("*.holder")} == {"x.holder", "y.holder"}
