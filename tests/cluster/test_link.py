"""Two hosts and the cable between them: two network namespaces of this machine, one rank in each."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.core import parent_guard, program, run_stage
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import TransientError
from pipelines.core.fingerprint import digest
from pipelines.core.request import ArtifactRef, StageRequest
from pipelines.core.store import LocalStore
from pipelines.stages import STAGES
from pipelines.training.config import PretrainConfig
from pipelines.training.metrics import read_records
from tests.cluster.slurm_servers import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.cluster_full, pytest.mark.timeout(2400)]

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29400
NODE_TIMEOUT_S = 10.0
DEADLINE_S = 40.0
"""From the cut to the end of everything: the time-out, what the ranks may take to die, and a busy machine."""
DOWN_S = 60.0
SETTINGS: dict[str, Any] = {
    "preset": "0.5m",
    "model": {"width": 32, "layers": 2, "heads": 2, "ffn_width": 44},
    "steps": 600,
    "batch_size": 8,
    "micro_batch_size": 2,
    "validate_every": 300,
    "validation_sequences": 5,
    "schedule": {"warmup": 2},
    "checkpoint": {"every": 10},
    "world_size": 2,
}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Hosts:
    """Two hosts, `a` and `b`, joined by one cable."""

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self.names = (f"ingot-{tag}-a", f"ingot-{tag}-b")
        self._ends = (f"v{tag}a", f"v{tag}b")

    def join(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self._ends[0], "type", "veth", "peer", "name", self._ends[1])
        for name, end, address in zip(self.names, self._ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
        self.cable("up")

    def cable(self, state: str) -> None:
        """Plug the cable in (`up`) or out (`down`)."""
        for name, end in zip(self.names, self._ends, strict=True):
            ip("-n", name, "link", "set", end, state)

    def part(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """The two hosts, with the cable plugged in."""
    made = Hosts()
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` here to make network namespaces with")
    try:
        made.join()
    except subprocess.CalledProcessError as error:
        made.part()
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
    yield made
    made.part()


@pytest.fixture
def training(prepared: Artifact, tmp_path: Path) -> Callable[[int], StageRequest]:
    """The request for a training that nothing but a cut will end soon."""
    store = LocalStore(tmp_path / "store")
    key = prepared.manifest.fingerprint
    config = PretrainConfig.model_validate(SETTINGS)

    def make(nodes: int) -> StageRequest:
        if not store.path("prepare", key).exists():
            shutil.copytree(prepared.path, store.path("prepare", key))
        return StageRequest(
            stage="pretrain",
            node="pretrain",
            fingerprint=digest(STAGES["pretrain"].identity(config, {"prepare": key})),
            configuration=SETTINGS,
            inputs={"prepare": ArtifactRef(stage="prepare", fingerprint=key)},
            data_hash="tiny",
            store=str(store.root),
            compute=ComputeConfig.model_validate(
                {"device": "cpu", "nodes": nodes, "node_timeout_s": NODE_TIMEOUT_S, "grace_s": 5.0}
            ),
        )

    return make


@pytest.fixture
def ending() -> Iterator[ExitStack]:
    """What is to be ended after the test, also one that fails."""
    with ExitStack() as stack:
        yield stack


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process, and take what it still had to say."""
    process.kill()
    with suppress(ValueError):  # it was taken already
        process.communicate()


def test_a_cable_that_is_out_for_a_minute_ends_both_sides_in_time_and_the_training_goes_on(
    hosts: Hosts, training: Callable[[int], StageRequest], ending: ExitStack, tmp_path: Path
) -> None:
    variables = {
        **program.environment(), "INGOT_RENDEZVOUS": f"{ADDRESSES[0]}:{PORT}", "INGOT_RENDEZVOUS_KEY": "k" * 16,
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    variables.pop("SLURM_JOB_ID", None)
    asked = tmp_path / "request.json"
    asked.write_text(training(2).model_dump_json())

    started: list[subprocess.Popen[str]] = []
    ending.callback(lambda: [end(process) for process in started])

    def start(host: int, module: str, *arguments: str) -> subprocess.Popen[str]:
        command = ["ip", "netns", "exec", hosts.names[host], *program.command(module, *arguments)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen([*parent_guard.command(), *command], env=variables, cwd=tmp_path, **pipes))
        return started[-1]

    def both() -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
        options = ["--rendezvous", f"{ADDRESSES[0]}:{PORT}", "--nodes", "2", "--node-rank", "1"]
        return start(0, "pipelines.core.run_stage", str(asked)), start(1, "pipelines.core.node", *options)

    def steps() -> int:
        records = [r["step"] for p in tmp_path.glob("store/scratch/*/metrics.jsonl") for r in read_records(p)]
        return max(records, default=0)

    def ranks() -> list[psutil.Process]:
        found = psutil.process_iter(["cmdline"])
        return [p for p in found if any(str(tmp_path) in part for part in p.info["cmdline"] or []) and p.is_running()]

    first, other = both()
    wait_for(lambda: steps() >= 25 or first.poll() is not None, "the training to be under way", 600)
    assert first.poll() is None, first.communicate()
    cut_at = time.monotonic()
    hosts.cable("down")
    words, _ = first.communicate(timeout=DEADLINE_S)
    assert other.wait(max(1.0, DEADLINE_S - (time.monotonic() - cut_at))) == TransientError.exit_code
    assert first.returncode == TransientError.exit_code
    assert "node 1" in words
    assert "was lost" in words
    assert "traceback" not in words.lower()
    assert other.stdout is not None
    assert "the first node was lost: the ranks here were killed" in other.stdout.read()
    other.stdout.close()
    wait_for(lambda: not ranks(), "the ranks of both hosts to be gone", 5)
    reached = steps()

    time.sleep(max(0.0, DOWN_S - (time.monotonic() - cut_at)))  # the cable is out for a minute
    hosts.cable("up")
    first, other = both()
    wait_for(lambda: steps() > reached or first.poll() is not None, "the training to go on", 600)
    attempts = [r["resumed_at"] for p in tmp_path.glob("store/scratch/*/attempts.jsonl") for r in read_records(p)]
    assert attempts[0] == 0
    assert reached - attempts[1] <= SETTINGS["checkpoint"]["every"] + 1, "one interval was lost, no more"
    words, _ = first.communicate(timeout=900)
    assert first.returncode == 0, words
    found = LocalStore(tmp_path / "store").find("pretrain", training(2).fingerprint)
    assert found is not None
    shutil.move(tmp_path / "store", tmp_path / "disturbed")
    assert found.digest == run_stage.execute(training(1)).digest
