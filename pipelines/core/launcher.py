"""Starts one process per rank, here and on the other nodes of a stage, watches them, and leaves none behind.

A rank dies -> the others are stopped and the error names the rank that was first, with the tail of its log.
A rank falls silent -> the stacks of all ranks are saved, the group is killed, and the run may be tried again.
A node is lost -> the ranks of all others are killed within seconds (see `nodes.py`).
A request to stop (see `stop.py`) -> handed on to the ranks, which save and exit within the grace time.
The launcher itself dies, however it dies -> the kernel and a watcher process kill the ranks (see `parent_guard.py`).

Signal handlers belong to the main thread. A program that calls `launch` from another thread installs a handler that
calls `terminate_all`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from pipelines.core import node_files, stop
from pipelines.core import nodes as node_servers
from pipelines.core.errors import BY_EXIT_CODE, ConfigError, IngotError, Preempted, TransientError
from pipelines.core.node_files import Workplace
from pipelines.core.ranks import HEARTBEAT_VARIABLE, Group, Placement, Rank, free_port

_POLL_S = 0.05
_SIBLING_GRACE_S = 5.0
"""How long the other ranks may go on after the first failure: long enough for their own last words in the log."""
_PORT_ATTEMPTS = 3
_PORT_TAKEN = ("EADDRINUSE", "address already in use")

_live: list[Group] = []
"""Groups at work in this process, for `terminate_all`."""


def launch(
    command: Sequence[str],
    *,
    world_size: int,
    log_dir: Path,
    env: Mapping[str, str] | None = None,
    nodes: int = 1,
    node_timeout_s: float = 30.0,
    workplace: Workplace | None = None,
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
        log_dir: where logs, heartbeats and stack dumps go; on every node a folder of this name.
        env: variables added to this process's environment, without what could change a result (`environment.py`).
        nodes: machines that the ranks are spread over, as many on each, the lowest here; see `nodes.py`.
        node_timeout_s: a node that has not been heard of for this many seconds is lost.
        workplace: the folder that the ranks work in; where other nodes do not see it, its files are carried.
        heartbeat_timeout_s: a rank that has not called `beat` for this many seconds counts as hung; None never does.
        grace_s: seconds between a request to stop and SIGKILL.
        on_poll: called about 20 times a second; it must not block. An exception from it stops the ranks.

    Raises:
        Preempted: a signal asked this run to stop.
        TransientError: a rank died by a signal or hung, a node was lost or never came, or no free port was found.
        IngotError: of the class that the exit code of the first failing rank stands for.
    """
    if world_size < 1 or world_size % nodes:
        raise ConfigError(f"world_size is {world_size}; it must be at least 1, and a multiple of the {nodes} nodes")
    log_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as met:
        others = met.enter_context(node_servers.meeting(nodes, log_dir, node_timeout_s)) if nodes > 1 else None
        if others is not None and workplace is not None:
            others.workplace = met.enter_context(node_files.serving(workplace, others.address))
        for _attempt in range(_PORT_ATTEMPTS):
            group = _group(tuple(command), world_size, log_dir, dict(env or {}), others)
            with _registered(group):
                failure = _supervise(group, heartbeat_timeout_s, grace_s, on_poll)
            if failure is None:
                return
            if group.stop_requests or group.lost() or not _lost_port_race(group):
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
        group.ask_to_stop(signum)
    return len(groups)


def beat() -> None:
    """Tell the launcher that this rank is alive; a no-op in a process that was not launched with a heartbeat."""
    if path := os.environ.get(HEARTBEAT_VARIABLE):
        Path(path).touch()


def _group(
    command: tuple[str, ...], world_size: int, log_dir: Path, env: dict[str, str], others: node_servers.Meeting | None
) -> Group:
    if others is None:
        return Group(command, log_dir, env, Placement(world_size, free_port()))
    here = others.address
    count = world_size // (len(others.nodes) + 1)
    place = Placement(world_size, free_port(here), here, first=0, count=count, own_address=here)
    return node_servers.World(command, log_dir, env, place, meeting=others)


@contextlib.contextmanager
def _registered(group: Group) -> Iterator[None]:
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
    group: Group, heartbeat_timeout_s: float | None, grace_s: float, on_poll: Callable[[], None]
) -> IngotError | None:
    """Watch until every rank has ended; return what went wrong, if anything did."""
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
        if group.lost() is not None:
            group.kill()
            break
        if heartbeat_timeout_s is not None and (silent := _silent(group, heartbeat_timeout_s)):
            return _abort_hung(group, silent, heartbeat_timeout_s)
        time.sleep(_POLL_S)
    return _verdict(group, grace_s)


def _verdict(group: Group, grace_s: float) -> IngotError | None:
    if not group.failed and not group.killed:
        return None
    if (lost := group.lost()) is not None and all(rank.code == 1 for rank in group.failed):
        return TransientError(lost, hint="run the same command again: it goes on from the newest checkpoint")
    # After a request to stop, code 1 is a rank that lost a peer which was quicker to go.
    expected = (Preempted.exit_code, -group.stop_signal, 1)
    if group.stops_seen and all(rank.code in expected for rank in group.failed):
        return _preempted(group, grace_s)
    first = group.first_failure()
    assert first.code is not None
    where = f"rank {first.rank} of {group.world_size}{first.where}"
    if first.code < 0:
        name = signal.Signals(-first.code).name
        if first.out_of_memory:
            name += " from the kernel's out-of-memory killer"
        kind: type[IngotError] = TransientError
        message = f"{where} was killed by {name}"
    else:
        kind = BY_EXIT_CODE.get(first.code, IngotError)
        message = f"{where} ended with exit code {first.code}"
    return kind(f"{message}; the end of {first.log}:\n{first.tail()}")


def _preempted(group: Group, grace_s: float) -> Preempted:
    name = signal.Signals(group.stop_signal).name
    if group.killed:
        what = f"stopped by {name}; not every rank had saved within {grace_s:g} s, so the checkpoint before that counts"
    else:
        what = f"stopped by {name}"
    return Preempted(what, hint="run the same command again: it goes on from the newest checkpoint")


def _silent(group: Group, timeout_s: float) -> list[Rank]:
    """Return the ranks whose heartbeat is overdue, longest silence first."""
    overdue = [rank for rank in group.running() if rank.is_silent(timeout_s)]
    return sorted(overdue, key=lambda rank: -rank.silence())


def _abort_hung(group: Group, silent: list[Rank], timeout_s: float) -> TransientError:
    """Save the stacks of all ranks, then kill them."""
    silence_s, where = silent[0].silence(), silent[0].where
    group.dump_stacks()
    return TransientError(
        f"rank {silent[0].rank} of {group.world_size}{where} gave no sign of life for {silence_s:.0f} s "
        f"(limit {timeout_s:g} s); the stacks of all ranks are in {group.log_dir}/stacks-*.txt",
        hint="run the same command again; if a step may take longer than the limit, raise the limit",
    )


def _lost_port_race(group: Group) -> bool:
    """Whether rank 0 failed because another process took the port between the choice and the bind."""
    return any(sign.lower() in rank.output().lower() for rank in group.failed for sign in _PORT_TAKEN)
