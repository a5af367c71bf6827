"""The guard as a program: commands die with their launcher, and watched process groups are killed when it is gone."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from pipelines.core import parent_guard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
GUARD = [sys.executable, "-I", "-S", parent_guard.__file__]
SLEEP = [sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(600)"]


@pytest.fixture
def sleeper() -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start processes in groups of their own that are up when they are returned."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(SLEEP, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def ends(process: subprocess.Popen[str]) -> int:
    return process.wait(20)


def test_a_command_takes_the_place_of_the_guard_with_its_exit_code() -> None:
    code = "import os, resource, sys; print(os.getpid(), resource.getrlimit(resource.RLIMIT_CORE)[0]); sys.exit(5)"
    process = subprocess.Popen(
        [*GUARD, "exec", str(os.getpid()), sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    said, _ = process.communicate(timeout=20)
    assert said.split() == [str(process.pid), "0"]
    assert process.returncode == 5


def test_a_command_whose_launcher_is_gone_already_never_starts() -> None:
    done = subprocess.run([*GUARD, "exec", "999999999", *SLEEP], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert done.stderr == "the launcher is gone\n"
    assert done.stdout == ""


def test_a_command_dies_with_its_launcher() -> None:
    """Its end of the pipe closes: the command, which would have slept, is gone."""
    code = (
        "import os, subprocess, sys\n"
        "subprocess.Popen([*sys.argv[1:5], 'exec', str(os.getpid()), *sys.argv[5:]])\n"
        "sys.stdin.read()\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, *GUARD, *SLEEP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "up\n"
    launcher.send_signal(signal.SIGKILL)
    started = time.monotonic()
    assert launcher.stdout.read() == ""
    assert time.monotonic() - started < 20
    launcher.communicate()


def test_watched_groups_are_killed_when_the_launcher_closes_its_end(
    sleeper: Callable[[], subprocess.Popen[str]],
) -> None:
    watched, other = [sleeper(), sleeper()], sleeper()
    watcher = subprocess.Popen([*GUARD, "watch", str(os.getpid())], stdin=subprocess.PIPE, text=True)
    # A group that is gone already must not keep the rest alive.
    watcher.communicate("999999998\n" + "".join(f"{process.pid}\n" for process in watched), timeout=20)
    assert [ends(process) for process in watched] == [-signal.SIGKILL] * 2
    assert other.poll() is None


def test_a_watcher_that_is_told_to_end_goes_on_watching(sleeper: Callable[[], subprocess.Popen[str]]) -> None:
    """SIGINT and SIGTERM reach a whole foreground group; the guard must outlast what it guards."""
    watched = sleeper()
    watcher = subprocess.Popen([*GUARD, "watch", str(os.getpid())], stdin=subprocess.PIPE, text=True)
    assert watcher.stdin is not None
    watcher.stdin.write(f"{watched.pid}\n")
    watcher.stdin.flush()
    ignored = f"/proc/{watcher.pid}/status"
    until = time.monotonic() + 20
    while not _ignores_term(ignored):
        assert time.monotonic() < until
    for number in (signal.SIGINT, signal.SIGTERM):
        watcher.send_signal(number)
    assert watched.poll() is None
    watcher.stdin.close()
    assert watcher.wait(20) == 0
    assert ends(watched) == -signal.SIGKILL


def test_a_guarded_command_may_open_as_many_files_as_it_is_allowed_to_ask_for() -> None:
    ask = "import resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    asks = [*parent_guard.command(), sys.executable, "-S", "-c", ask]
    few = (
        f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, {most})); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    said = subprocess.run([sys.executable, "-S", "-c", few, *asks], capture_output=True, text=True, check=True)
    assert said.stdout.split() == [str(most)] * 2


def _ignores_term(status: str) -> bool:
    with open(status) as file:  # noqa: PTH123 - a file of the kernel
        (mask,) = (int(line.split()[1], 16) for line in file if line.startswith("SigIgn"))
    return bool(mask >> (signal.SIGTERM - 1) & 1)
