"""The launcher: every way in which ranks can end, with real processes and real signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipelines.core import launcher
from pipelines.core.errors import ConfigError, IngotError, IntegrityError, NumericError, Preempted, TransientError
from pipelines.core.launcher import launch, terminate_all

DEADLINE_S = 30.0
"""How long a test waits for something that takes milliseconds on an idle machine."""

CHECKOUT = Path(__file__).resolve().parents[3]

SLEEP = "import time; time.sleep(600)"
TRAP = """
import os, signal, sys, time
folder = sys.argv[1]
def stop(*_):
    open(f"{folder}/saved-{os.environ['RANK']}", "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
open(f"{folder}/ready-{os.environ['RANK']}", "w").close()
time.sleep(600)
"""


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE_S:g} s for {what}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> object:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert launcher._live == []


def test_ranks_find_their_place_in_the_environment_as_under_torchrun(tmp_path: Path) -> None:
    code = """
import json, os, sys
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "EXTRA"]
json.dump({name: os.environ[name] for name in names}, open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w"))
"""
    launch(python(code, tmp_path), world_size=3, log_dir=tmp_path / "logs", env={"EXTRA": "1", "RANK": "9"})
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [place["RANK"] for place in seen] == [place["LOCAL_RANK"] for place in seen] == ["0", "1", "2"]
    assert {place["WORLD_SIZE"] for place in seen} == {place["LOCAL_WORLD_SIZE"] for place in seen} == {"3"}
    assert {place["MASTER_ADDR"] for place in seen} == {"127.0.0.1"}
    assert len({place["MASTER_PORT"] for place in seen}) == 1
    assert {place["EXTRA"] for place in seen} == {"1"}


def test_ranks_meet_at_the_port_they_were_given(tmp_path: Path) -> None:
    code = """
import os, socket, time
address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if os.environ["RANK"] == "0":
    server = socket.create_server(address)
    server.settimeout(30)
    server.accept()[0].sendall(b"met")
else:
    deadline = time.monotonic() + 30
    while True:
        try:
            client = socket.create_connection(address, timeout=30)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert client.recv(3) == b"met"
"""
    launch(python(code), world_size=2, log_dir=tmp_path)


def test_output_of_each_rank_goes_to_its_own_log_and_a_second_run_appends(tmp_path: Path) -> None:
    code = "import os, sys; print('out', os.environ['RANK']); print('err', os.environ['RANK'], file=sys.stderr)"
    launch(python(code), world_size=2, log_dir=tmp_path)
    launch(python(code), world_size=2, log_dir=tmp_path)
    for rank in range(2):
        lines = (tmp_path / f"rank-{rank}.log").read_text().splitlines()
        assert sorted(lines) == [f"err {rank}", f"err {rank}", f"out {rank}", f"out {rank}"]


def test_no_ranks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="world_size is 0"):
        launch(python("pass"), world_size=0, log_dir=tmp_path)


@pytest.mark.parametrize(
    ("code", "error"), [(2, ConfigError), (3, IntegrityError), (4, TransientError), (5, NumericError)]
)
def test_an_exit_code_becomes_the_error_it_stands_for_with_the_end_of_the_log(
    tmp_path: Path, code: int, error: type[IngotError]
) -> None:
    program = f"import os, sys; print('the reason'); sys.exit({code} if os.environ['RANK'] == '1' else 0)"
    with pytest.raises(error, match=rf"rank 1 of 2 ended with exit code {code}[\s\S]*rank-1.log[\s\S]*the reason"):
        launch(python(program), world_size=2, log_dir=tmp_path)


def test_an_unexpected_exception_is_not_taken_for_a_transient_fault(tmp_path: Path) -> None:
    with pytest.raises(IngotError, match=r"exit code 1[\s\S]*ZeroDivisionError") as caught:
        launch(python("1 / 0"), world_size=1, log_dir=tmp_path)
    assert type(caught.value) is IngotError


def test_the_tail_holds_this_attempt_only(tmp_path: Path) -> None:
    with pytest.raises(IngotError, match="first attempt"):
        launch(python("raise SystemExit('first attempt')"), world_size=1, log_dir=tmp_path)
    with pytest.raises(IngotError, match="second attempt") as caught:
        launch(python("raise SystemExit('second attempt')"), world_size=1, log_dir=tmp_path)
    assert "first attempt" not in str(caught.value)


def test_a_rank_killed_by_a_signal_stops_the_others_soon_and_is_named(tmp_path: Path) -> None:
    code = f"import os, signal\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n{SLEEP}"
    started = time.monotonic()
    with pytest.raises(TransientError, match=r"rank 1 of 3 was killed by SIGKILL; the end of .*rank-1\.log"):
        launch(python(code), world_size=3, log_dir=tmp_path)
    assert time.monotonic() - started < 10


def test_the_first_failing_rank_is_named_not_the_one_that_lost_its_peer(tmp_path: Path) -> None:
    """Rank 0 notices the death of rank 1 through a socket, as gloo does, and dies of it at once."""
    code = """
import os, signal, socket, time
address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if os.environ["RANK"] == "0":
    server = socket.create_server(address); server.settimeout(30)
    if server.accept()[0].recv(1) == b"": raise RuntimeError("connection closed by peer")
deadline = time.monotonic() + 30
while time.monotonic() < deadline:
    try: client = socket.create_connection(address, timeout=30); break
    except ConnectionRefusedError: time.sleep(0.05)
os.kill(os.getpid(), signal.SIGSEGV)
"""
    with pytest.raises(TransientError, match="rank 1 of 2 was killed by SIGSEGV"):
        launch(python(code), world_size=2, log_dir=tmp_path)


def test_a_preempted_rank_leaves_the_others_the_grace_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler signalled the ranks themselves; rank 0 publishes for longer than a crashed rank's peers would get."""
    monkeypatch.setattr(launcher, "_SIBLING_GRACE_S", 0.2)
    code = """
import os, sys, time
if os.environ["RANK"] == "0":
    time.sleep(1)
    open(sys.argv[1], "w").close()
sys.exit(75)
"""
    with pytest.raises(Preempted):
        launch(python(code, tmp_path / "saved"), world_size=2, log_dir=tmp_path / "logs", grace_s=60)
    assert (tmp_path / "saved").exists()


def test_a_rank_that_finishes_early_does_not_end_the_run(tmp_path: Path) -> None:
    code = """
import os, sys, time
if os.environ["RANK"] == "1":
    while not os.path.exists(sys.argv[1]): time.sleep(0.01)
"""
    go, polls = tmp_path / "go", []

    def poll() -> None:
        polls.append(len(polls))
        if len(polls) == 10:
            go.touch()

    launch(python(code, go), world_size=2, log_dir=tmp_path / "logs", on_poll=poll)
    assert len(polls) >= 10


def test_an_exception_from_on_poll_stops_the_ranks(tmp_path: Path) -> None:
    def poll() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        launch(python(SLEEP), world_size=2, log_dir=tmp_path, on_poll=poll)


def test_what_a_rank_started_and_left_behind_is_killed(tmp_path: Path) -> None:
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
open(sys.argv[1], "w").write(str(child.pid))
"""
    pid_file = tmp_path / "pid"
    launch(python(code, pid_file), world_size=1, log_dir=tmp_path / "logs")
    wait_for(lambda: not alive(int(pid_file.read_text())), "the grandchild to die")


def test_a_stop_lets_the_ranks_save_and_ends_as_preempted(tmp_path: Path) -> None:
    def poll() -> None:
        if all((tmp_path / f"ready-{rank}").exists() for rank in range(2)) and not launcher._live[0].stop_requests:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="stopped by SIGTERM"):
        launch(python(TRAP, tmp_path), world_size=2, log_dir=tmp_path / "logs", on_poll=poll)
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert signal.getsignal(signal.SIGTERM) is handler


def test_launch_in_a_thread_is_stopped_through_terminate_all(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            launch(python(TRAP, tmp_path), world_size=2, log_dir=tmp_path / "logs")
        except Preempted as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both ranks")
    assert terminate_all(signal.SIGTERM) == 1
    thread.join(DEADLINE_S)
    assert [type(error) for error in caught] == [Preempted]
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert terminate_all(signal.SIGTERM) == 0


IGNORE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"{sys.argv[1]}/ready-{os.environ['RANK']}", "w").close()
time.sleep(600)
"""


def test_ranks_that_ignore_the_signal_are_killed_when_the_grace_is_over(tmp_path: Path) -> None:
    def poll() -> None:
        if (tmp_path / "ready-0").exists() and not launcher._live[0].stop_requests:
            terminate_all(signal.SIGTERM)

    with pytest.raises(Preempted, match=r"not every rank had saved within 0\.3 s"):
        launch(python(IGNORE, tmp_path), world_size=1, log_dir=tmp_path / "logs", grace_s=0.3, on_poll=poll)


def test_a_second_signal_does_not_wait_for_the_grace(tmp_path: Path) -> None:
    def poll() -> None:
        if (tmp_path / "ready-0").exists() and launcher._live[0].stop_requests == launcher._live[0].stops_seen < 2:
            terminate_all(signal.SIGTERM)

    started = time.monotonic()
    with pytest.raises(Preempted):
        launch(python(IGNORE, tmp_path), world_size=1, log_dir=tmp_path / "logs", grace_s=600, on_poll=poll)
    assert time.monotonic() - started < DEADLINE_S


def test_an_error_during_the_stop_is_not_hidden_by_it(tmp_path: Path) -> None:
    code = TRAP.replace("sys.exit(75)", "sys.exit(3)")

    def poll() -> None:
        if (tmp_path / "ready-0").exists() and not launcher._live[0].stop_requests:
            terminate_all(signal.SIGTERM)

    with pytest.raises(IntegrityError, match="exit code 3"):
        launch(python(code, tmp_path), world_size=1, log_dir=tmp_path / "logs", on_poll=poll)


def test_work_that_ends_in_spite_of_a_stop_counts_as_done(tmp_path: Path) -> None:
    code = TRAP.replace("sys.exit(75)", "sys.exit(0)")

    def poll() -> None:
        if (tmp_path / "ready-0").exists() and not launcher._live[0].stop_requests:
            terminate_all(signal.SIGTERM)

    launch(python(code, tmp_path), world_size=1, log_dir=tmp_path / "logs", on_poll=poll)
    assert (tmp_path / "saved-0").exists()


BEATING = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pipelines.core.launcher import beat
for step in range(int(sys.argv[2])):
    beat()
    if step == int(sys.argv[3]) and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(float(sys.argv[4]))
"""


def test_a_hung_rank_ends_the_run_with_the_stacks_of_all_ranks(tmp_path: Path) -> None:
    with pytest.raises(TransientError, match="rank 1 of 2 gave no sign of life") as caught:
        launch(python(BEATING, CHECKOUT, 10_000, 3, 0.05), world_size=2, log_dir=tmp_path, heartbeat_timeout_s=1.5)
    assert str(tmp_path) in str(caught.value)
    for rank in range(2):
        assert "most recent call first" in (tmp_path / f"stacks-{rank}.txt").read_text()


def test_a_slow_rank_is_not_killed(tmp_path: Path) -> None:
    launch(python(BEATING, CHECKOUT, 4, -1, 0.6), world_size=2, log_dir=tmp_path, heartbeat_timeout_s=1.5)


def test_silence_before_the_first_heartbeat_is_start_up_not_a_hang(tmp_path: Path) -> None:
    launch(python("import time; time.sleep(0.5)"), world_size=1, log_dir=tmp_path, heartbeat_timeout_s=0.1)


def test_heartbeats_are_told_by_change_so_a_wrong_clock_kills_nobody(tmp_path: Path) -> None:
    code = """
import os, time
for year_seconds in (0, 4102444800, 1, 4102444801, 2, 4102444802, 3):
    open(os.environ["INGOT_HEARTBEAT"], "w").close()
    os.utime(os.environ["INGOT_HEARTBEAT"], (year_seconds, year_seconds))
    time.sleep(0.3)
"""
    launch(python(code), world_size=1, log_dir=tmp_path, heartbeat_timeout_s=1.2)


def test_beat_outside_a_launch_does_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(launcher.HEARTBEAT_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    launcher.beat()
    assert list(tmp_path.iterdir()) == []


def test_a_port_lost_to_another_process_is_retried_with_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, socket; socket.create_server((os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])))"
    with socket.create_server(("127.0.0.1", 0)) as other:
        ports = iter([other.getsockname()[1], launcher.free_port()])
        monkeypatch.setattr(launcher, "free_port", lambda: next(ports))
        launch(python(code), world_size=1, log_dir=tmp_path)
        assert list(ports) == []


def test_a_port_that_is_never_free_is_a_transient_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, socket; socket.create_server((os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])))"
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(launcher, "free_port", lambda: other.getsockname()[1])
        with pytest.raises(TransientError, match="taken by other processes"):
            launch(python(code), world_size=1, log_dir=tmp_path)


NEST = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from pipelines.core.launcher import launch
launch([sys.executable, "-c", sys.argv[3], sys.argv[2]], world_size=2, log_dir=Path(sys.argv[2]) / "logs")
"""
FAMILY = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
name = f"{{sys.argv[1]}}/pids-{{os.environ['RANK']}}"
open(name + ".tmp", "w").write(f"{{os.getpid()}} {{child.pid}}")
os.rename(name + ".tmp", name)
time.sleep(600)
"""


@pytest.mark.parametrize("watcher_dies_too", [False, True])
def test_sigkill_of_the_launcher_leaves_no_rank_behind(tmp_path: Path, watcher_dies_too: bool) -> None:
    """The watcher reaches the ranks and what they started; without it the kernel still reaches the ranks."""
    main = subprocess.Popen(python(NEST, CHECKOUT, tmp_path, FAMILY))
    wait_for(lambda: len(list(tmp_path.glob("pids-?"))) == 2, "both ranks")
    families = [list(map(int, (tmp_path / f"pids-{rank}").read_text().split())) for rank in range(2)]
    others = psutil.Process(main.pid).children()
    watchers = [child for child in others if child.pid not in {family[0] for family in families}]
    assert len(watchers) == 1
    if watcher_dies_too:
        watchers[0].kill()
    main.kill()
    main.wait()
    try:
        doomed = [family[0] for family in families] if watcher_dies_too else [pid for f in families for pid in f]
        wait_for(lambda: not any(alive(pid) for pid in [*doomed, watchers[0].pid]), "every process to die")
    finally:
        for pid in (pid for family in families for pid in family if alive(pid)):
            os.kill(pid, signal.SIGKILL)
