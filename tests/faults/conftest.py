"""The fault harness: real pretraining in processes that get killed, compared with a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.store import LocalStore
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.metrics import read_records

DEADLINE_S = 240.0
SETTINGS: dict[str, Any] = {
    "preset": "0.5m",
    "model": {"width": 32, "layers": 2, "heads": 2, "ffn_width": 44},
    "steps": 20,
    "batch_size": 8,
    "micro_batch_size": 2,
    "validate_every": 10,
    "validation_sequences": 5,
    "schedule": {"warmup": 2},
    "checkpoint": {"every": 5, "keep": 3},
    "zero_stage": 2,
    "world_size": 2,
}


@dataclass(frozen=True)
class Ended:
    """How one attempt ended."""

    code: int
    message: str
    """What it printed for the user."""
    seconds: float


@dataclass
class Pretraining:
    """One pretraining in a store of its own, attempted as often as a test likes."""

    root: Path
    prepared: Artifact
    config: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))
    compute: dict[str, Any] = field(default_factory=lambda: {"device": "cpu", "grace_s": 60.0})
    attempts: int = 0

    @property
    def store(self) -> LocalStore:
        """The store."""
        return LocalStore(self.root / "store")

    @property
    def scratch(self) -> Path:
        """The scratch folder; there is one while the run is unfinished."""
        (found,) = (self.store.root / "scratch").iterdir()
        return found

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints of the unfinished run."""
        return Checkpoints(self.scratch / "checkpoints", 2)

    def start(
        self, *, faults: list[dict[str, Any]] | None = None, wait_s: float | None = None, **changes: Any
    ) -> subprocess.Popen[str]:
        """Start an attempt; `changes` replace settings for this one."""
        self.attempts += 1
        order = self.root / f"order-{self.attempts}.json"
        plan = self.root / f"faults-{self.attempts}.json"
        plan.write_text(json.dumps(faults or []))
        asked = {"prepared": str(self.prepared.path), "store": str(self.store.root), "compute": self.compute}
        order.write_text(json.dumps({**asked, "config": {**self.config, **changes}, "wait_s": wait_s}))
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("driver.py")), str(order)],
            env={**os.environ, "INGOT_FAULTS": str(plan), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def attempt(self, **options: Any) -> Ended:
        """Make one attempt and wait for its end."""
        started = time.monotonic()
        process = self.start(**options)
        out, err = process.communicate(timeout=DEADLINE_S)
        return Ended(process.returncode, err or out, time.monotonic() - started)

    def finish(self, **options: Any) -> Finished:
        """Make an attempt that must reach the end."""
        ended = self.attempt(**options)
        assert ended.code == 0, ended.message
        return Finished(artifact.load(Path(ended.message.strip().splitlines()[-1])))

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        """Wait until the records show that a step is done."""
        deadline = time.monotonic() + DEADLINE_S
        while not any(
            record["step"] >= step
            for path in (self.store.root / "scratch").glob("*/metrics.jsonl")
            for record in read_records(path)
        ):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)


@dataclass(frozen=True)
class Finished:
    """What a finished run is compared by."""

    made: Artifact

    @property
    def losses(self) -> list[str]:
        """`float.hex` of the loss of every step."""
        found: list[str] = self.made.read_json("training.json")["losses"]
        return found

    @property
    def files(self) -> dict[str, str]:
        """sha256 of every result file: weights, configuration, tokenizer, facts."""
        return {name: file.sha256 for name, file in self.made.manifest.files.items() if not file.observation}

    @property
    def steps(self) -> list[int]:
        """Steps in `metrics.jsonl`, as they stand there."""
        return [record["step"] for record in read_records(self.made.path / "metrics.jsonl")]

    @property
    def resumed_at(self) -> list[int]:
        """Where the attempts after the first one went on from."""
        found: list[int] = self.made.read_json("observations.json")["resumed_at"]
        return found


def related(root: Path) -> list[psutil.Process]:
    """Every live process with a path below `root` on its command line or in its fault plan."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(str(root) in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue  # it ended while it was looked at
    return found


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path: Path) -> Iterator[None]:
    """No process, no temporary file and no lease outlives a test."""
    yield
    deadline = time.monotonic() + 15  # a SIGKILLed launcher's ranks need a moment to be reaped
    while (orphans := related(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    names = [" ".join(process.cmdline()) for process in orphans]
    for process in orphans:
        process.kill()
    assert names == []
    for store in tmp_path.rglob("store"):
        if any(LocalStore(store).artifacts()):  # the last attempt was left to finish
            assert [path.name for path in store.rglob(".*")] == []
            assert list(store.rglob("*.tmp")) == []
            assert list((store / "leases").glob("*.holder")) == []
            assert list((store / "scratch").iterdir()) == []


@pytest.fixture
def pretraining(tmp_path: Path, prepared: Artifact) -> Callable[..., Pretraining]:
    """Return a fresh pretraining, with changes to its settings."""

    def make(**changes: Any) -> Pretraining:
        return Pretraining(tmp_path, prepared, {**SETTINGS, **changes})

    return make


@pytest.fixture(scope="session")
def _killed_once(tmp_path_factory: pytest.TempPathFactory, prepared: Artifact) -> Path:
    """A store whose pretraining lost rank 1 after step 7, with a checkpoint at 5; made once, copied by tests."""
    run = Pretraining(tmp_path_factory.mktemp("killed"), prepared)
    ended = run.attempt(faults=[{"point": "train.after_step", "rank": 1, "step": 7, "action": "SIGKILL"}])
    assert ended.code == 4, ended.message
    assert "rank 1 of 2 was killed by SIGKILL" in ended.message
    assert run.checkpoints.steps() == [5]
    return run.store.root


@pytest.fixture
def killed_at_7(pretraining: Callable[..., Pretraining], _killed_once: Path) -> Pretraining:
    """A pretraining that was killed after step 7, with a checkpoint at 5, in a store of the test's own."""
    run = pretraining()
    shutil.copytree(_killed_once, run.store.root)
    return run


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, prepared: Artifact) -> Finished:
    """The oracle: the run that nobody disturbed, once per session."""
    return Pretraining(tmp_path_factory.mktemp("oracle"), prepared).finish()
