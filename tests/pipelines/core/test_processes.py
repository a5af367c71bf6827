"""Names of processes: told apart from those that get the same id later."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from pipelines.core import processes
from pipelines.core.processes import start_of, this_process


def test_this_process_is_alive_and_names_itself() -> None:
    name = this_process()
    assert name.alive()
    assert str(name) == f"process {os.getpid()} on {name.host}"


def test_a_process_with_spaces_and_parentheses_in_its_name_is_read() -> None:
    code = "open('/proc/self/comm', 'w').write('a) Z 1 (b'); print('named', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as named:
        assert named.stdout is not None
        assert named.stdout.readline() == b"named\n"
        ticks = int((start_of(named.pid) or "").rpartition(":")[2])
        seconds = psutil.boot_time() + ticks / os.sysconf("SC_CLK_TCK")
        assert seconds == pytest.approx(psutil.Process(named.pid).create_time(), abs=2)
        named.communicate(b"\n")


def test_a_zombie_and_an_unknown_id_are_no_processes() -> None:
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    assert start_of(zombie.pid) is None
    assert processes._start_by_psutil(zombie.pid) is None
    zombie.wait()
    assert start_of(zombie.pid) is None
    assert processes._start_by_psutil(zombie.pid) is None


def test_where_there_is_no_proc_psutil_tells_the_start() -> None:
    assert processes._start_by_psutil(os.getpid()) == f"{psutil.Process().create_time():.2f}"
