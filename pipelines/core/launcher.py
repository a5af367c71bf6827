"""Starts one process per rank on this machine, watches them, and leaves none behind.

A rank dies -> the others are stopped and the error names the rank that was first, with the tail of its log.
A rank falls silent -> the stacks of all ranks are saved, the group is killed, and the run may be tried again.
A request to stop (see `stop.py`) -> handed on to the ranks, which save and exit within the grace time.
The launcher itself dies, however it dies -> the kernel and a watcher process kill the ranks (see `parent_guard.py`).

Signal handlers belong to the main thread. A program that calls `launch` from another thread installs a handler that
calls `terminate_all`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.core import environment, stop
from pipelines.core.errors import BY_EXIT_CODE, ConfigError, IngotError, Preempted, TransientError

LOOPBACK = "127.0.0.1"
"""Where ranks meet: all of them are on this machine."""
HEARTBEAT_VARIABLE = "INGOT_HEARTBEAT"
"""Names the file that a rank touches to show that it is alive."""

_GUARD = Path(__file__).with_name("parent_guard.py")
_POLL_S = 0.05
_SIBLING_GRACE_S = 5.0
"""How long the other ranks may go on after the first failure: long enough for their own last words in the log."""
_STARTUP_S = 120.0
"""Least time before the first heartbeat is missed: importing torch on a busy machine is not a hang."""
_DUMP_S = 2.0
"""How long the ranks get to write their stacks."""
_PORT_ATTEMPTS = 3
_PORT_TAKEN = ("EADDRINUSE", "address already in use")
_TAIL_LINES = 20
_TAIL_BYTES = 1 << 16

_live: list[_Group] = []
"""Groups at work in this process, for `terminate_all`."""


def launch(
    command: Sequence[str],
    *,
    world_size: int,
    log_dir: Path,
    env: Mapping[str, str] | None = None,
    heartbeat_timeout_s: float | None = None,
    grace_s: float = 60.0,
    on_poll: Callable[[], None] = lambda: None,
) -> None:
    """Run `command` once per rank and return when every rank has exited with 0.

    The ranks find RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in their environment, as
    under torchrun. Their output is appended to `log_dir/rank-N.log`.

    Args:
        command: program and arguments, the same for every rank.
        world_size: number of ranks.
        log_dir: where logs, heartbeats and stack dumps go.
        env: variables added to this process's environment, without what could change a result (`environment.py`).
        heartbeat_timeout_s: a rank that has not called `beat` for this many seconds counts as hung; None never does.
        grace_s: seconds between a request to stop and SIGKILL.
        on_poll: called about 20 times a second; it must not block. An exception from it stops the ranks.

    Raises:
        Preempted: a signal asked this run to stop.
        TransientError: a rank died by a signal or hung, or no free port was found.
        IngotError: of the class that the exit code of the first failing rank stands for.
    """
    if world_size < 1:
        raise ConfigError(f"world_size is {world_size}; it must be at least 1")
    log_dir.mkdir(parents=True, exist_ok=True)
    for _attempt in range(_PORT_ATTEMPTS):
        group = _Group(tuple(command), world_size, log_dir, dict(env or {}))
        with _registered(group):
            failure = _supervise(group, heartbeat_timeout_s, grace_s, on_poll)
        if failure is None:
            return
        if group.stop_requests or not _lost_port_race(group):
            raise failure
    raise TransientError(f"{_PORT_ATTEMPTS} free ports in a row were taken by other processes before rank 0 bound them")


def terminate_all(signum: int) -> int:
    """Ask every running group of this process to stop; a second call kills them. Safe in a signal handler.

    Args:
        signum: the signal that the ranks get.

    Returns:
        How many groups were running.
    """
    groups = tuple(_live)
    for group in groups:
        group.stop_signal = signum
        group.stop_requests += 1
    return len(groups)


def beat() -> None:
    """Tell the launcher that this rank is alive; a no-op in a process that was not launched with a heartbeat."""
    if path := os.environ.get(HEARTBEAT_VARIABLE):
        Path(path).touch()


@dataclass
class _Rank:
    """One process and what is known of it."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    """Size of the log before this attempt."""
    heartbeat: Path
    heard_at: float
    """When the heartbeat file was last seen to change, on this process's monotonic clock: clocks may jump."""
    heard_mtime: int | None = None
    code: int | None = None

    def output(self) -> str:
        """Return the end of what this attempt wrote, at most 64 KiB."""
        with self.log.open("rb") as stream:
            stream.seek(max(self.log_start, self.log.stat().st_size - _TAIL_BYTES))
            return stream.read().decode(errors="replace")

    def tail(self) -> str:
        """Return the last lines that this attempt wrote, indented."""
        lines = [line.rstrip() for line in self.output().splitlines() if line.strip()]
        return "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:]) or "    (no output)"


@dataclass(eq=False)
class _Group:
    """All ranks of one launch."""

    command: tuple[str, ...]
    world_size: int
    log_dir: Path
    env: dict[str, str]
    ranks: list[_Rank] = field(default_factory=list)
    failed: list[_Rank] = field(default_factory=list)
    """Ranks that ended with something else than 0, in the order in which they were seen."""
    stop_signal: int = signal.SIGTERM
    stop_requests: int = 0
    """How often `terminate_all` was called; read by the supervising thread."""
    stops_seen: int = 0
    killed: bool = False
    """True once SIGKILL was sent: what ends after that says nothing about the cause."""

    def start(self) -> None:
        """Start the watcher, then the ranks."""
        port = _free_port()
        self.watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), "watch", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )
        assert self.watcher.stdin is not None
        for rank in range(self.world_size):
            self.ranks.append(self._start_rank(rank, port))
            self.watcher.stdin.write(b"%d\n" % self.ranks[-1].process.pid)

    def _start_rank(self, rank: int, port: int) -> _Rank:
        log = self.log_dir / f"rank-{rank}.log"
        heartbeat = self.log_dir / f"heartbeat-{rank}"
        heartbeat.unlink(missing_ok=True)
        placement: dict[str, object] = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_WORLD_SIZE": self.world_size,
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": port,
            HEARTBEAT_VARIABLE: heartbeat.resolve(),
            "PYTHONUNBUFFERED": 1,  # or the last words of a killed rank are lost
            "PYTHONFAULTHANDLER": 1,  # SIGABRT and SIGSEGV write the stacks of all threads to the log
        }
        if (loopback := _loopback_interface()) is not None:
            placement["GLOO_SOCKET_IFNAME"] = loopback  # it would take the interface of this machine's name
        own = {name: str(value) for name, value in placement.items()}
        variables = {**environment.cleared(os.environ), **self.env, **own}
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_GUARD), "exec", str(os.getpid()), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
            return _Rank(rank, process, log, stream.tell(), heartbeat, time.monotonic())

    def running(self) -> list[_Rank]:
        """Return the ranks that were not yet seen to end."""
        return [rank for rank in self.ranks if rank.code is None]

    def collect(self) -> None:
        """Note which ranks have ended, and kill what they started and left behind."""
        for rank in self.running():
            rank.code = rank.process.poll()
            if rank.code is not None:
                _kill_group(rank)
                if rank.code != 0 and not self.killed:
                    self.failed.append(rank)

    def send(self, signum: int) -> None:
        """Signal the ranks themselves, not the helpers they started, which they need until they have saved."""
        for rank in self.running():
            rank.process.send_signal(signum)

    def kill(self) -> None:
        """SIGKILL every rank with all that it started, and wait for the ranks."""
        self.killed = True
        for rank in self.running():
            _kill_group(rank)
            rank.code = rank.process.wait()

    def close(self) -> None:
        """Kill what is left, the watcher last."""
        self.kill()
        if hasattr(self, "watcher"):
            self.watcher.kill()
            self.watcher.communicate()

    def first_failure(self) -> _Rank:
        """Return the rank that failed first; ranks that only lost their peer end with a plain exception, code 1."""
        together = [rank for rank in self.failed if rank.code != 1]
        return (together or self.failed)[0]


@contextlib.contextmanager
def _registered(group: _Group) -> Iterator[None]:
    """Make `terminate_all` reach this group, from this process's signal handlers too when they can be set here."""
    _live.append(group)
    try:
        # The ranks save on SIGTERM and SIGINT; what became of a terminal is nothing to them.
        with stop.passed_to(lambda signum: terminate_all(signal.SIGTERM if signum == signal.SIGHUP else signum)):
            group.start()
            yield
    finally:
        group.close()
        _live.remove(group)


def _supervise(
    group: _Group, heartbeat_timeout_s: float | None, grace_s: float, on_poll: Callable[[], None]
) -> IngotError | None:
    """Watch until every rank has ended; return what went wrong, if anything did."""
    oom_kills = _oom_kills()
    deadline = float("inf")
    while True:
        group.collect()
        if not group.running():
            break
        on_poll()
        if group.failed:
            saving = all(rank.code == Preempted.exit_code for rank in group.failed)
            deadline = min(deadline, time.monotonic() + (grace_s if saving else _SIBLING_GRACE_S))
        if group.stop_requests > group.stops_seen:
            deadline = time.monotonic() + (grace_s if group.stops_seen == 0 and group.stop_requests == 1 else 0.0)
            group.stops_seen = group.stop_requests
            group.send(group.stop_signal)
        if time.monotonic() >= deadline:
            group.kill()
            break
        if heartbeat_timeout_s is not None and (silent := _silent(group, heartbeat_timeout_s)):
            return _abort_hung(group, silent, heartbeat_timeout_s)
        time.sleep(_POLL_S)
    return _verdict(group, oom_kills, grace_s)


def _verdict(group: _Group, oom_kills: int, grace_s: float) -> IngotError | None:
    if not group.failed and not group.killed:
        return None
    # After a request to stop, code 1 is a rank that lost a peer which was quicker to go.
    expected = (Preempted.exit_code, -group.stop_signal, 1)
    if group.stops_seen and all(rank.code in expected for rank in group.failed):
        return _preempted(group, grace_s)
    first = group.first_failure()
    assert first.code is not None
    where = f"rank {first.rank} of {group.world_size}"
    if first.code < 0:
        name = signal.Signals(-first.code).name
        if first.code == -signal.SIGKILL and _oom_kills() > oom_kills:
            name += " from the kernel's out-of-memory killer"
        kind: type[IngotError] = TransientError
        message = f"{where} was killed by {name}"
    else:
        kind = BY_EXIT_CODE.get(first.code, IngotError)
        message = f"{where} ended with exit code {first.code}"
    return kind(f"{message}; the end of {first.log}:\n{first.tail()}")


def _preempted(group: _Group, grace_s: float) -> Preempted:
    name = signal.Signals(group.stop_signal).name
    if group.killed:
        what = f"stopped by {name}; not every rank had saved within {grace_s:g} s, so the checkpoint before that counts"
    else:
        what = f"stopped by {name}"
    return Preempted(what, hint="run the same command again: it goes on from the newest checkpoint")


def _silent(group: _Group, timeout_s: float) -> list[_Rank]:
    """Return the ranks whose heartbeat is overdue, longest silence first."""
    now = time.monotonic()
    for rank in group.running():
        with contextlib.suppress(FileNotFoundError):
            mtime = rank.heartbeat.stat().st_mtime_ns
            if mtime != rank.heard_mtime:
                rank.heard_at, rank.heard_mtime = now, mtime
    overdue = [r for r in group.running() if now - r.heard_at > _patience(r, timeout_s)]
    return sorted(overdue, key=lambda rank: rank.heard_at)


def _patience(rank: _Rank, timeout_s: float) -> float:
    return timeout_s if rank.heard_mtime is not None else max(timeout_s, _STARTUP_S)


def _abort_hung(group: _Group, silent: list[_Rank], timeout_s: float) -> TransientError:
    """Save the stacks of all ranks, then kill them."""
    silence_s = time.monotonic() - silent[0].heard_at
    written = {rank.rank: rank.log.stat().st_size for rank in group.running()}
    group.send(signal.SIGABRT)
    group.send(signal.SIGCONT)  # a stopped process dumps nothing
    deadline = time.monotonic() + _DUMP_S
    while group.running() and time.monotonic() < deadline:
        group.collect()
        time.sleep(_POLL_S)
    group.kill()
    for rank in group.ranks:
        if rank.rank in written:
            with rank.log.open("rb") as stream:
                stream.seek(written[rank.rank])
                (group.log_dir / f"stacks-{rank.rank}.txt").write_bytes(stream.read())
    return TransientError(
        f"rank {silent[0].rank} of {group.world_size} gave no sign of life for {silence_s:.0f} s "
        f"(limit {timeout_s:g} s); the stacks of all ranks are in {group.log_dir}/stacks-*.txt",
        hint="run the same command again; if a step may take longer than the limit, raise the limit",
    )


def _lost_port_race(group: _Group) -> bool:
    """Whether rank 0 failed because another process took the port between the choice and the bind."""
    return any(sign.lower() in rank.output().lower() for rank in group.failed for sign in _PORT_TAKEN)


def _kill_group(rank: _Rank) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.process.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _loopback_interface() -> str | None:
    """Return the name of the interface that nothing outside this machine reaches: that of Linux, or of BSD."""
    return next((name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}), None)


def _oom_kills() -> int:
    """Return how many processes the kernel has killed for memory since it started; 0 where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
