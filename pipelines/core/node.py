"""What runs on the other nodes of a stage: it starts, watches and ends ranks as the first node says (see `nodes.py`).

    python -m pipelines.core.node --rendezvous HOST:PORT --nodes 2 --node-rank 1

Under `srun` the number of the task says which node this is, and Slurm where the first one is.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from pipelines.core import node_files, rendezvous
from pipelines.core.errors import ConfigError, IngotError, TransientError
from pipelines.core.ranks import Group, Placement, Rank
from pipelines.core.rendezvous import HELLO_S, KEY_VARIABLE, MEET_S, POLL_S, RENDEZVOUS_VARIABLE, TELL_S, Line


def main(arguments: list[str]) -> int:
    """Do what the first node says until it lets this one go; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.core.node")
    parser.add_argument("--rendezvous", required=True, help="HOST:PORT of the first node")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--node-rank", type=int, help="1, 2, ...; under srun it is the task's number, and one")
    parser.add_argument("--wait-s", type=float, default=MEET_S, help="how long to look for the first node")
    options = parser.parse_args(arguments)
    task = os.environ.get("SLURM_PROCID")
    asked = _StopAsked()
    try:
        if options.node_rank is None and task is None:
            raise ConfigError("nothing says which node this is", hint="--node-rank=1, 2, ...")
        number = options.node_rank if options.node_rank is not None else int(task or 0) + 1
        host, port = rendezvous.parse(options.rendezvous)
        host = host or os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
        line = _connect(host, port, number, options.nodes, options.wait_s)
        _serve(line, asked)
    except IngotError as error:
        print(f"node {options.node_rank or task}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


class _StopAsked:
    """Remembers SIGTERM: the first node decides what becomes of it."""

    def __init__(self) -> None:
        self.signum: int | None = None
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._note)

    def _note(self, signum: int, _frame: Any) -> None:
        self.signum = signum


def _connect(host: str, port: int, number: int, nodes: int, wait_s: float) -> Line:
    """Find the first node, and have each prove to the other that it knows the key.

    Raises:
        ConfigError: its name does not resolve, or it refuses this node.
        TransientError: it cannot be reached.
    """
    key, deadline = os.environ.get(KEY_VARIABLE, ""), time.monotonic() + wait_s
    if not key:
        raise ConfigError(f"${KEY_VARIABLE} is not set", hint="it is the same secret on all nodes of a stage")
    addresses = rendezvous.resolved(host, port)
    while True:
        reason = "no address"
        for _, _, _, _, address in addresses:
            try:
                line = Line(socket.create_connection(address[:2], timeout=HELLO_S))
            except OSError as error:
                reason = error.strerror or str(error)
                continue
            if rendezvous.is_greeted(line, key, node=number, nodes=nodes, host=_own_name()):
                return line
            reason = "it said nothing"
        if time.monotonic() > deadline:
            raise TransientError(
                f"the first node at {host}:{port} cannot be reached from {socket.gethostname()}: {reason}",
                hint=f"${RENDEZVOUS_VARIABLE} chooses another of its addresses",
            )
        time.sleep(0.2)


def _own_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _serve(line: Line, asked: _StopAsked) -> None:
    """Start, watch and end ranks as the first node says.

    Raises:
        TransientError: it was lost.
    """
    served, timeout_s, told_at, told_stop = _Served(line), MEET_S, 0.0, False
    try:
        while not line.ended and line.silence() <= (served.timeout_s or timeout_s):
            for message in line.received(POLL_S):
                if message["do"] == "end":
                    return
                served.obey(message)
            if served.changed() or time.monotonic() - told_at > TELL_S:
                told_at = time.monotonic()
                line.send(ranks=served.told())
            if asked.signum is not None and not told_stop:
                told_stop = True
                line.send(stop=asked.signum)
    finally:
        served.close()
        line.close()
    raise TransientError("the first node was lost: the ranks here were killed")


class _Served:
    """The ranks that the first node has had started here."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._group: Group | None = None
        self._arrival: _Arrival | None = None
        self.timeout_s: float | None = None
        """How long the first node may be silent, once it has said so."""

    def obey(self, message: Mapping[str, Any]) -> None:
        """Do what a message says."""
        if message["do"] == "start":
            self.close()
            self.timeout_s = float(message["timeout_s"])
            self._arrival = _Arrival(message)
        elif message["do"] in {"kill", "signal"} and self._arrival is not None:
            self._arrival.code = -int(message.get("signum", signal.SIGKILL))
        elif self._group is None or message["do"] == "ping":
            return
        elif message["do"] == "signal":
            self._group.send(int(message["signum"]))
        elif message["do"] == "dump":
            self._group.dump_stacks()
        elif message["do"] == "kill":
            self._group.kill()

    def changed(self) -> bool:
        """Look at the ranks; return whether one has ended since the last look."""
        if self._arrival is not None and self._arrival.here is not None and self._arrival.code is None:
            self._group, self._arrival = _started(self._arrival, self._line), None
        if self._group is None:
            return False
        before = len(self._group.running())
        self._group.collect()
        return len(self._group.running()) != before

    def told(self) -> list[dict[str, Any]]:
        """Return what the first node is to know of the ranks."""
        if self._arrival is not None:
            return self._arrival.told()
        return [] if self._group is None else [_told(rank) for rank in self._group.local]

    def close(self) -> None:
        """Kill what is left."""
        if self._group is not None:
            self._group.close()


class _Arrival:
    """What the ranks of this node read is on its way here; the first node is told that they are starting.

    Args:
        message: what the first node wants to be started.
    """

    def __init__(self, message: Mapping[str, Any]) -> None:
        self.message = message
        self.here: node_files.Here | None = None
        self.code: int | None = None
        """Why no rank will be started: the exit code of an error, or the signal that said so."""
        self._output = ""
        threading.Thread(target=self._work, name="arrival", daemon=True).start()

    def _work(self) -> None:
        try:
            self.here = node_files.arrive(self.message)
        except IngotError as error:
            self.code, self._output = error.exit_code, str(error)
        except Exception as error:  # noqa: BLE001 - the first node tells of it
            self.code, self._output = 1, repr(error)

    def told(self) -> list[dict[str, Any]]:
        """Return what the first node is to know of ranks that are not there yet."""
        placed = self.message["placement"]
        facts = {"code": self.code, "silence": 0.0, "beaten": False, "out_of_memory": False, "output": self._output}
        return [{"rank": rank, **facts} for rank in range(placed["first"], placed["first"] + placed["count"])]


def _started(arrival: _Arrival, line: Line) -> Group:
    assert arrival.here is not None
    here, message = arrival.here, arrival.message
    here.log_dir.mkdir(parents=True, exist_ok=True)
    own = rendezvous.plain(line.connection.getsockname()[0])
    placement = Placement(**message["placement"], own_address=own)
    group = Group(here.command, here.log_dir, here.env, placement)
    group.start()
    return group


def _told(rank: Rank) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "code": rank.code,
        "silence": rank.silence(),
        "beaten": rank.has_beaten,
        "out_of_memory": rank.out_of_memory,
        "output": rank.output() if rank.code else "",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
