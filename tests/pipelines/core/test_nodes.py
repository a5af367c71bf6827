"""Ranks on several nodes: two processes of this host stand for two nodes, with everything real but the distance."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.core import launcher, nodes, program, rendezvous
from pipelines.core.errors import ConfigError, IntegrityError, Preempted, TransientError
from pipelines.core.launcher import launch
from pipelines.core.ranks import free_port
from tests.pipelines.core.test_launcher import BEATING, CHECKOUT, SLEEP, TRAP, alive, python, wait_for

PLACE = """
import json, os, sys
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"]
json.dump({name: os.environ[name] for name in names}, open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w"))
"""


class Nodes:
    """What the environment of a stage on several nodes says, and programs that stand for the others."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.said = folder / "nodes.txt"
        self.where = f"[{host}]:{free_port(host)}" if ":" in host else f"{host}:{free_port(host)}"
        self.key = secrets.token_hex(8)
        self.started: list[subprocess.Popen[str]] = []

    def come(self, number: int = 1, count: int = 2, **changes: str) -> subprocess.Popen[str]:
        """Start the program of another node."""
        asked = {"rendezvous": self.where, "nodes": str(count), "node-rank": str(number), "wait-s": "20"}
        options = [f"--{name}={value}" for name, value in asked.items()]
        variables = {**program.environment(), rendezvous.KEY_VARIABLE: self.key, **changes}
        command = program.command("pipelines.core.node", *options)
        with self.said.open("ab") as log:
            process = subprocess.Popen(command, env=variables, stderr=log, text=True, start_new_session=True)
        self.started.append(process)
        return process


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Nodes]:
    """Two nodes at the loopback."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    made = Nodes(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv(rendezvous.RENDEZVOUS_VARIABLE, made.where)
    monkeypatch.setenv(rendezvous.KEY_VARIABLE, made.key)
    yield made
    for process in made.started:
        process.kill()
        process.wait()
    wait_for(lambda: {c.pid for c in psutil.Process().children(recursive=True)} <= before, "every process to end")


def test_ranks_of_two_nodes_form_one_world(world: Nodes, tmp_path: Path) -> None:
    other = world.come()
    launch(python(PLACE, tmp_path), world_size=4, nodes=2, log_dir=tmp_path / "logs")
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert [place["LOCAL_RANK"] for place in seen] == ["0", "1", "0", "1"]
    assert {(place["WORLD_SIZE"], place["LOCAL_WORLD_SIZE"], place["MASTER_ADDR"]) for place in seen} == {
        ("4", "2", "127.0.0.1")
    }
    assert len({place["MASTER_PORT"] for place in seen}) == 1
    assert {place["GLOO_SOCKET_IFNAME"] for place in seen} == {"lo"}
    assert other.wait(20) == 0


def test_a_rank_that_dies_on_another_node_stops_all_with_its_name_and_log(world: Nodes, tmp_path: Path) -> None:
    world.come()
    code = f"import os, sys\nif os.environ['RANK'] == '3': print('the reason'); sys.exit(3)\n{SLEEP}"
    started = time.monotonic()
    with pytest.raises(
        IntegrityError, match=r"rank 3 of 4 on node 1 \(.*, 127\.0\.0\.1\) ended with exit code 3"
    ) as told:
        launch(python(code), world_size=4, nodes=2, log_dir=tmp_path)
    assert "the reason" in str(told.value)
    assert time.monotonic() - started < 15


def test_a_node_that_is_lost_ends_the_others_within_seconds(world: Nodes, tmp_path: Path) -> None:
    other = world.come()

    def cut() -> None:
        if len(list(tmp_path.glob("ready-*"))) == 2:
            other.kill()

    started = time.monotonic()
    with pytest.raises(TransientError, match=r"node 1 \(.*\) was lost: its connection ended"):
        launch(python(TRAP, tmp_path), world_size=2, nodes=2, log_dir=tmp_path / "logs", on_poll=cut)
    assert time.monotonic() - started < 15


def test_a_node_that_falls_silent_is_lost(world: Nodes, tmp_path: Path) -> None:
    other = world.come()

    def stop() -> None:
        if len(list(tmp_path.glob("ready-*"))) == 2:
            other.send_signal(signal.SIGSTOP)

    with pytest.raises(TransientError, match=r"node 1 \(.*\) was lost: it was not heard of for 2 s"):
        launch(python(TRAP, tmp_path), world_size=2, nodes=2, log_dir=tmp_path / "l", node_timeout_s=2, on_poll=stop)


def test_without_the_first_node_the_ranks_of_the_others_die(world: Nodes, tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(CHECKOUT)!r})
from pathlib import Path
from pipelines.core.launcher import launch
launch([sys.executable, "-c", sys.argv[2], sys.argv[1]], world_size=2, nodes=2, log_dir=Path(sys.argv[1]) / "logs")
"""
    pids = "import os, sys, time\nopen(f\"{sys.argv[1]}/pid-{os.getpid()}\", 'w').close()\ntime.sleep(600)"
    first = subprocess.Popen(python(code, tmp_path, pids))
    other = world.come()
    wait_for(lambda: len(list(tmp_path.glob("pid-*"))) == 2, "both ranks")
    first.kill()
    first.wait()
    assert other.wait(20) == TransientError.exit_code
    assert "the first node was lost" in world.said.read_text()
    found = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    wait_for(lambda: not any(map(alive, found)), "the ranks to die")


@pytest.mark.parametrize("signalled", ["first", "other", "both"])
def test_a_stop_lets_all_ranks_save_whichever_node_is_told(world: Nodes, tmp_path: Path, signalled: str) -> None:
    other, told = world.come(), []

    def stop() -> None:
        if len(list(tmp_path.glob("ready-*"))) == 2 and not told:
            told.append(signalled)
            if signalled != "first":
                other.terminate()
            if signalled == "both":
                wait_for(_noted, "the other node's word")
            if signalled != "other":
                os.kill(os.getpid(), signal.SIGTERM)

    def _noted() -> bool:
        launcher._live[0].collect()
        return launcher._live[0].stop_requests == 1

    with pytest.raises(Preempted, match="stopped by SIGTERM"):
        launch(python(TRAP, tmp_path), world_size=2, nodes=2, log_dir=tmp_path / "logs", on_poll=stop)
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}


def test_a_rank_that_hangs_on_another_node_is_named_with_the_stacks_of_all(world: Nodes, tmp_path: Path) -> None:
    world.come()
    with pytest.raises(TransientError, match=r"rank 1 of 2 on node 1 \(.*\) gave no sign of life"):
        launch(
            python(BEATING, CHECKOUT, 10_000, 3, 0.05),
            world_size=2,
            nodes=2,
            log_dir=tmp_path,
            heartbeat_timeout_s=1.5,
        )
    for rank in range(2):
        assert "most recent call first" in (tmp_path / f"stacks-{rank}.txt").read_text()


def test_a_stranger_and_a_node_with_another_key_are_left_out(world: Nodes, tmp_path: Path) -> None:
    host, port = rendezvous.parse(world.where)

    def disturb() -> None:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=20) as stranger:
            stranger.sendall(b'{"proof": "0", "node": 1, "nodes": 2, "nonce": "", "host": "x"}\n')
            stranger.recv(1 << 12)
        refused.append(world.come(**{rendezvous.KEY_VARIABLE: "wrong"}).wait(20))
        world.come()

    refused: list[int] = []
    (threading.Timer(0.5, disturb)).start()
    launch(python("pass"), world_size=2, nodes=2, log_dir=tmp_path)
    assert refused == [ConfigError.exit_code]
    assert "another key: $INGOT_RENDEZVOUS_KEY is not the same on all nodes" in world.said.read_text()


def test_nodes_meet_over_ipv6(world: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        six = Nodes(tmp_path, "::1")
    except OSError:
        pytest.skip("this host has no IPv6")
    world.where = six.where
    monkeypatch.setenv(rendezvous.RENDEZVOUS_VARIABLE, six.where)
    world.come()
    launch(python(PLACE, tmp_path), world_size=2, nodes=2, log_dir=tmp_path / "logs")
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert {(place["MASTER_ADDR"], place["GLOO_SOCKET_IFNAME"]) for place in seen} == {("::1", "lo")}


def test_a_name_that_does_not_resolve_is_said_on_either_side(
    world: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.where = "no-such-host.invalid:29400"
    assert world.come().wait(60) == ConfigError.exit_code
    told = world.said.read_text()
    assert "the name of the first node, 'no-such-host.invalid', does not resolve on" in told
    assert "give an address: $INGOT_RENDEZVOUS=ADDRESS:PORT" in told
    monkeypatch.setenv(rendezvous.RENDEZVOUS_VARIABLE, world.where)
    with pytest.raises(ConfigError, match="does not resolve"):
        launch(python("pass"), world_size=2, nodes=2, log_dir=tmp_path)


def test_a_node_that_does_not_come_is_named(world: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "MEET_S", 0.5)
    world.come(number=2, count=3)
    with pytest.raises(TransientError, match=r"node 1(, 2)? of 3 did not come to port \d+ within 0\.5 s"):
        launch(python("pass"), world_size=3, nodes=3, log_dir=tmp_path)


def test_ranks_on_other_nodes_need_somebody_who_starts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ConfigError, match=r"compute\.nodes = 2: nothing here starts ranks on other nodes"):
        launch(python("pass"), world_size=2, nodes=2, log_dir=tmp_path)
    with pytest.raises(ConfigError, match="world_size is 3; it must be at least 1, and a multiple of the 2 nodes"):
        launch([sys.executable], world_size=3, nodes=2, log_dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "parts"), [("a:1", ("a", 1)), ("[::1]:2", ("::1", 2)), ("a", ("a", 0)), ("", ("", 0)), (":5", ("", 5))]
)
def test_where_nodes_meet_is_a_host_and_a_port(text: str, parts: tuple[str, int]) -> None:
    assert rendezvous.parse(text) == parts
