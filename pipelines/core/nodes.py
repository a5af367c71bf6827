"""The other machines of a stage whose ranks are on several: how they find the first one, and what they do for it.

The first node is the process that executes the stage. It listens at a free port; on every other node runs

    python -m pipelines.core.node --rendezvous HOST:PORT --nodes 2 --node-rank 1

which connects, proves that it knows the key in $INGOT_RENDEZVOUS_KEY (and has the first node prove the same), starts
the ranks it is told to, and tells about them twice a second. Where either hears nothing of the other for
`node_timeout_s`, or the connection ends, the ranks are killed. Inside a job of Slurm the first node starts these
programs itself, by `srun`; elsewhere $INGOT_RENDEZVOUS says where it is to listen, and they are started by whatever
started the stage. All ranks meet at the address by which the other nodes have reached the first: no name is resolved
for it.

Lines of JSON go over the connection. Neither they nor what the ranks say to each other is encrypted: the network
between the nodes of a cluster has to be trusted, as torch.distributed trusts it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.core import program, rendezvous
from pipelines.core.errors import ConfigError, TransientError
from pipelines.core.ranks import Group, Rank
from pipelines.core.rendezvous import KEY_VARIABLE, MEET_S, POLL_S, RENDEZVOUS_VARIABLE, TELL_S, Line

_END_S = 5.0
"""How long a node may take to kill its ranks."""
_LOG = "nodes.log"


class RemoteRank(Rank):
    """A rank of another node, as that node tells of it."""

    def __init__(self, rank: int, log: Path, where: str) -> None:
        self.rank, self.log, self.where = rank, log, where
        self._silence, self._told_at, self._beaten, self._output = 0.0, time.monotonic(), False, ""

    def update(self, told: Mapping[str, Any]) -> None:
        """Take over what its node tells."""
        self.code, self.out_of_memory, self._output = told["code"], told["out_of_memory"], told["output"]
        self._silence, self._beaten, self._told_at = told["silence"], told["beaten"], time.monotonic()

    def output(self) -> str:
        """Return the end of what it wrote, once it has failed."""
        return self._output

    def silence(self) -> float:
        """Return the seconds since its last heartbeat, counted by its node."""
        return self._silence + time.monotonic() - self._told_at

    @property
    def has_beaten(self) -> bool:
        """Whether there was a heartbeat."""
        return self._beaten


@dataclass
class Node:
    """Another machine that has come."""

    number: int
    host: str
    address: str
    """Where it came from; a connection that was reset no longer knows."""
    line: Line

    def __str__(self) -> str:
        return f"node {self.number} ({self.host}, {self.address})"


@dataclass
class Meeting:
    """The other nodes of a stage, in their order."""

    nodes: list[Node]
    timeout_s: float
    workplace: dict[str, Any] | None = None
    """Where the files of the ranks are; see `node_files.serving`."""

    @property
    def address(self) -> str:
        """The address of this machine by which the others have reached it."""
        return rendezvous.plain(self.nodes[0].line.connection.getsockname()[0])


@dataclass(eq=False)
class World(Group):
    """All ranks of one launch, on this machine and on others."""

    meeting: Meeting = field(kw_only=True)
    remote: list[RemoteRank] = field(default_factory=list)
    _told_at: float = 0.0
    _lost: str | None = None
    _asked_by_node: bool = False

    @property
    def ranks(self) -> list[Rank]:
        """Every rank, here and elsewhere."""
        return [*self.local, *self.remote]

    def ask_to_stop(self, signum: int) -> None:
        """Note a request; a scheduler tells every node, which is one request."""
        if self._asked_by_node:
            self._asked_by_node = False
        else:
            super().ask_to_stop(signum)

    def start(self) -> None:
        """Start the ranks here, and have the other nodes start theirs."""
        super().start()
        place, count = self.placement, len(self.placement.here)
        for node in self.meeting.nodes:
            first = node.number * count
            log = self.log_dir
            ranks = range(first, first + count)
            self.remote += [RemoteRank(rank, log / f"rank-{rank}.log", f" on {node}") for rank in ranks]
            node.line.send(
                do="start",
                command=self.command,
                env=self.env,
                log_dir=str(log.resolve()),
                placement={"world_size": place.world_size, "port": place.port, "address": place.address}
                | {"first": first, "count": count},
                timeout_s=self.meeting.timeout_s,
                workplace=self.meeting.workplace,
            )

    def collect(self) -> None:
        """Note which ranks have ended, here and elsewhere, and show the other nodes that this one is alive."""
        super().collect()
        by_number = {rank.rank: rank for rank in self.remote}
        for node in self.meeting.nodes:
            for message in node.line.received():
                for told in message.get("ranks", []):
                    self._take(by_number[told["rank"]], told)
                if message.get("stop") and not self.stop_requests:
                    super().ask_to_stop(message["stop"])
                    self._asked_by_node = True
            silence = node.line.silence()
            if self._lost is None and self._expected(node) and (node.line.ended or silence > self.meeting.timeout_s):
                how = "its connection ended" if node.line.ended else f"it was not heard of for {silence:.0f} s"
                self._lost = f"{node} was lost: {how}"
        if time.monotonic() - self._told_at > TELL_S:
            self._told_at = time.monotonic()
            self._tell(do="ping")

    def _expected(self, node: Node) -> bool:
        count = len(self.placement.here)
        return any(rank.code is None for rank in self.remote[(node.number - 1) * count : node.number * count])

    def _take(self, rank: RemoteRank, told: Mapping[str, Any]) -> None:
        ended = rank.code is None and told["code"] is not None
        rank.update(told)
        if ended and rank.code != 0 and not self.killed:
            self.failed.append(rank)

    def _tell(self, **message: Any) -> None:
        for node in self.meeting.nodes:
            if not node.line.ended:
                node.line.send(**message)

    def send(self, signum: int) -> None:
        """Signal the ranks, here and elsewhere."""
        super().send(signum)
        self._tell(do="signal", signum=int(signum))

    def dump_stacks(self) -> None:
        """Have all ranks write their stacks and die."""
        self._tell(do="dump")
        super().dump_stacks()

    def kill(self) -> None:
        """SIGKILL every rank, and wait until the other nodes have said so, as far as they can."""
        self.killed = True
        if any(rank.code is None for rank in self.remote):
            self._tell(do="kill")
        super().kill()
        deadline = time.monotonic() + _END_S
        while any(self._expected(node) and not node.line.ended for node in self.meeting.nodes):
            if time.monotonic() > deadline or self._lost is not None:
                break
            self.collect()
            time.sleep(POLL_S)
        for rank in self.remote:
            rank.code = -signal.SIGKILL if rank.code is None else rank.code

    def lost(self) -> str | None:
        """Return which node is no longer there, in words, or None."""
        return self._lost


@contextlib.contextmanager
def meeting(nodes: int, log_dir: Path, timeout_s: float) -> Iterator[Meeting]:
    """Wait until the other nodes have come, and let them go at the end of the block.

    Args:
        nodes: how many there are, with this one.
        log_dir: where what they say goes, when they are started from here.
        timeout_s: how long a node may be silent before it is lost.

    Raises:
        ConfigError: nothing says where the nodes meet, or its name does not resolve.
        TransientError: a node did not come.
    """
    key = os.environ.get(KEY_VARIABLE) or secrets.token_hex(32)
    host, port = rendezvous.parse(os.environ.get(RENDEZVOUS_VARIABLE, ""))
    in_slurm = "SLURM_JOB_ID" in os.environ
    if not in_slurm and not (port and os.environ.get(KEY_VARIABLE)):
        raise ConfigError(
            f"compute.nodes = {nodes}: nothing here starts ranks on other nodes",
            hint=f"compute.executor=slurm does; by hand it takes ${RENDEZVOUS_VARIABLE}=HOST:PORT and ${KEY_VARIABLE}",
        )
    with contextlib.ExitStack() as at_end:
        listener = at_end.enter_context(_listen(host, port))
        started = (
            at_end.enter_context(_by_srun(nodes, host, listener.getsockname()[1], key, log_dir)) if in_slurm else None
        )
        come: dict[int, Node] = {}
        at_end.callback(_close, come)
        _await(listener, nodes, key, come, started, log_dir)
        met = Meeting([come[number] for number in range(1, nodes)], timeout_s)
        yield met
        for node in met.nodes:
            node.line.send(do="end")


def _close(come: Mapping[int, Node]) -> None:
    for node in come.values():
        node.line.close()


def _await(
    listener: socket.socket,
    nodes: int,
    key: str,
    come: dict[int, Node],
    started: subprocess.Popen[bytes] | None,
    log_dir: Path,
) -> None:
    deadline = time.monotonic() + MEET_S
    while len(come) < nodes - 1:
        absent = ", ".join(str(number) for number in range(1, nodes) if number not in come)
        if started is not None and started.poll() is not None:
            log = (log_dir / _LOG).read_text(errors="replace").splitlines()[-10:]
            raise TransientError("\n".join([f"node {absent} could not be started:", *log]))
        if time.monotonic() > deadline:
            raise TransientError(
                f"node {absent} of {nodes} did not come to port {listener.getsockname()[1]} within {MEET_S:g} s",
                hint="is the port open between the nodes? `nodes.log` and the log of the job have more",
            )
        if select.select([listener], [], [], 0.2)[0]:
            connection, peer = listener.accept()
            line = Line(connection)
            try:
                hello = rendezvous.greet(line, key)
            except (TransientError, KeyError, ValueError, TypeError):
                line.close()  # a stranger
                continue
            if 0 < hello["node"] < nodes and hello["nodes"] == nodes:
                come[hello["node"]] = Node(hello["node"], str(hello["host"]), rendezvous.plain(peer[0]), line)
            else:
                line.send(refused=f"this is a stage of {nodes} nodes, counted from 0")
                line.close()


def _listen(host: str, port: int) -> socket.socket:
    if not host:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    family, *_, address = rendezvous.resolved(host, port)[0]
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port}: {error.strerror}", hint=f"${RENDEZVOUS_VARIABLE} names this node"
        ) from None


@contextlib.contextmanager
def _by_srun(nodes: int, host: str, port: int, key: str, log_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start this program on every other node of the job that this process runs in."""
    count = nodes - 1
    step = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--relative=1", "--overlap"]
    step += ["--mem=0", "--kill-on-bad-exit=0", "--input=none", "--quiet"]
    if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
        step.append(f"--cpus-per-task={cores}")
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    command = program.command("pipelines.core.node", "--rendezvous", where, "--nodes", str(nodes))
    with (log_dir / _LOG).open("ab") as log:
        process = subprocess.Popen(
            [*step, *command], env={**program.environment(), KEY_VARIABLE: key}, stdout=log, stderr=log
        )
    try:
        yield process
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    finally:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
