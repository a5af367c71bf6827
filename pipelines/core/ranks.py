"""The processes of the ranks on one machine: started, signalled, watched and killed together.

`launcher.py` decides what to do about them; `nodes.py` does the same with those of other machines.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.core import environment

LOOPBACK = "127.0.0.1"
"""Where ranks meet that are all on this machine."""
HEARTBEAT_VARIABLE = "INGOT_HEARTBEAT"
"""Names the file that a rank touches to show that it is alive."""

_GUARD = Path(__file__).with_name("parent_guard.py")
_POLL_S = 0.05
_STARTUP_S = 120.0
"""Least time before the first heartbeat is missed: importing torch on a busy machine is not a hang."""
_DUMP_S = 2.0
"""How long the ranks get to write their stacks."""
_TAIL_LINES = 20
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Placement:
    """Which ranks of a world one machine has, and where all of them meet."""

    world_size: int
    port: int
    address: str = LOOPBACK
    first: int = 0
    """The lowest rank here."""
    count: int | None = None
    """How many ranks are here; None: all."""
    own_address: str = LOOPBACK
    """An address of this machine, by whose interface the ranks here reach the others."""

    @property
    def here(self) -> range:
        """The ranks on this machine."""
        return range(self.first, self.first + (self.world_size if self.count is None else self.count))


class Rank:
    """One rank, wherever its process is, and what is known of it."""

    rank: int
    log: Path
    code: int | None = None
    """Exit code, or minus the signal that killed it; None while it runs."""
    out_of_memory: bool = False
    """Whether the kernel killed it for memory."""
    where: str = ""
    """The machine, for messages; empty for this one."""

    def output(self) -> str:
        """Return the end of what this attempt wrote, at most 64 KiB."""
        raise NotImplementedError

    def silence(self) -> float:
        """Return the seconds since its last heartbeat."""
        raise NotImplementedError

    @property
    def has_beaten(self) -> bool:
        """Whether there was a heartbeat."""
        raise NotImplementedError

    def is_silent(self, timeout_s: float) -> bool:
        """Tell whether its heartbeat is overdue; before the first one, starting up takes its time."""
        return self.silence() > (timeout_s if self.has_beaten else max(timeout_s, _STARTUP_S))

    def tail(self) -> str:
        """Return the last lines that this attempt wrote, indented."""
        lines = [line.rstrip() for line in self.output().splitlines() if line.strip()]
        return "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:]) or "    (no output)"


@dataclass
class LocalRank(Rank):
    """A process of this machine."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    """Size of the log before this attempt."""
    heartbeat: Path
    heard_at: float
    """When the heartbeat file was last seen to change, on this process's monotonic clock: clocks may jump."""
    heard_mtime: int | None = None

    def output(self) -> str:
        """Return the end of what this attempt wrote, at most 64 KiB."""
        with self.log.open("rb") as stream:
            stream.seek(max(self.log_start, self.log.stat().st_size - _TAIL_BYTES))
            return stream.read().decode(errors="replace")

    def silence(self) -> float:
        """Return the seconds since its heartbeat file last changed."""
        now = time.monotonic()
        with contextlib.suppress(FileNotFoundError):
            mtime = self.heartbeat.stat().st_mtime_ns
            if mtime != self.heard_mtime:
                self.heard_at, self.heard_mtime = now, mtime
        return now - self.heard_at

    @property
    def has_beaten(self) -> bool:
        """Whether there was a heartbeat."""
        return self.heard_mtime is not None


@dataclass(eq=False)
class Group:
    """All ranks of one launch on this machine."""

    command: tuple[str, ...]
    log_dir: Path
    env: dict[str, str]
    placement: Placement
    local: list[LocalRank] = field(default_factory=list)
    failed: list[Rank] = field(default_factory=list)
    """Ranks that ended with something else than 0, in the order in which they were seen."""
    stop_signal: int = signal.SIGTERM
    stop_requests: int = 0
    """How often somebody asked to stop; read by the supervising thread."""
    stops_seen: int = 0
    killed: bool = False
    """True once SIGKILL was sent: what ends after that says nothing about the cause."""

    @property
    def world_size(self) -> int:
        """How many ranks there are on all machines."""
        return self.placement.world_size

    @property
    def ranks(self) -> list[Rank]:
        """Every rank."""
        return [*self.local]

    def ask_to_stop(self, signum: int) -> None:
        """Note a request to stop; safe in a signal handler."""
        self.stop_signal = signum
        self.stop_requests += 1

    def start(self) -> None:
        """Start the watcher, then the ranks."""
        self.oom_kills = _oom_kills()
        self.watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), "watch", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )
        assert self.watcher.stdin is not None
        for rank in self.placement.here:
            self.local.append(self._start_rank(rank))
            self.watcher.stdin.write(b"%d\n" % self.local[-1].process.pid)

    def _start_rank(self, rank: int) -> LocalRank:
        log = self.log_dir / f"rank-{rank}.log"
        heartbeat = self.log_dir / f"heartbeat-{rank}"
        heartbeat.unlink(missing_ok=True)
        place = self.placement
        placement: dict[str, object] = {
            "RANK": rank,
            "LOCAL_RANK": rank - place.first,
            "WORLD_SIZE": place.world_size,
            "LOCAL_WORLD_SIZE": len(place.here),
            "MASTER_ADDR": place.address,
            "MASTER_PORT": place.port,
            HEARTBEAT_VARIABLE: heartbeat.resolve(),
            "PYTHONUNBUFFERED": 1,  # or the last words of a killed rank are lost
            "PYTHONFAULTHANDLER": 1,  # SIGABRT and SIGSEGV write the stacks of all threads to the log
        }
        if (interface := interface_of(place.own_address)) is not None:
            placement["GLOO_SOCKET_IFNAME"] = interface  # it would take the interface of this machine's name
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
            return LocalRank(rank, process, log, stream.tell(), heartbeat, time.monotonic())

    def running(self) -> list[Rank]:
        """Return the ranks that were not yet seen to end."""
        return [rank for rank in self.ranks if rank.code is None]

    def running_here(self) -> list[LocalRank]:
        """Return those of this machine."""
        return [rank for rank in self.local if rank.code is None]

    def collect(self) -> None:
        """Note which ranks have ended, and kill what they started and left behind."""
        for rank in self.running_here():
            rank.code = rank.process.poll()
            if rank.code is not None:
                _kill_group(rank)
                rank.out_of_memory = rank.code == -signal.SIGKILL and _oom_kills() > self.oom_kills
                if rank.code != 0 and not self.killed:
                    self.failed.append(rank)

    def send(self, signum: int) -> None:
        """Signal the ranks themselves, not the helpers they started, which they need until they have saved."""
        for rank in self.running_here():
            rank.process.send_signal(signum)

    def dump_stacks(self) -> None:
        """Have the ranks write their stacks, kill them, and keep the stacks in files of their own."""
        written = {rank.rank: rank.log.stat().st_size for rank in self.running_here()}
        self.send(signal.SIGABRT)
        self.send(signal.SIGCONT)  # a stopped process dumps nothing
        deadline = time.monotonic() + _DUMP_S
        while self.running_here() and time.monotonic() < deadline:
            self.collect()
            time.sleep(_POLL_S)
        self.kill()
        for rank in self.local:
            if rank.rank in written:
                with rank.log.open("rb") as stream:
                    stream.seek(written[rank.rank])
                    (self.log_dir / f"stacks-{rank.rank}.txt").write_bytes(stream.read())

    def kill(self) -> None:
        """SIGKILL every rank with all that it started, and wait for the ranks."""
        self.killed = True
        for rank in self.running_here():
            _kill_group(rank)
            rank.code = rank.process.wait()

    def close(self) -> None:
        """Kill what is left, the watcher last."""
        self.kill()
        if hasattr(self, "watcher"):
            self.watcher.kill()
            self.watcher.communicate()

    def lost(self) -> str | None:
        """Return which machine is no longer there, in words, or None."""
        return None

    def first_failure(self) -> Rank:
        """Return the rank that failed first; ranks that only lost their peer end with a plain exception, code 1."""
        together = [rank for rank in self.failed if rank.code != 1]
        return (together or self.failed)[0]


def free_port(address: str = LOOPBACK) -> int:
    """Return a port that nobody listens on at an address of this machine."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def interface_of(address: str) -> str | None:
    """Return the name of the interface with an address: for the loopback that of Linux, or of BSD; None for none."""
    if address == LOOPBACK:
        return next((name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}), None)
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return None


def _kill_group(rank: LocalRank) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.process.pid, signal.SIGKILL)


def _oom_kills() -> int:
    """Return how many processes the kernel has killed for memory since it started; 0 where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
