"""Launches real ranks (gloo, DeepSpeed) for the exactness tests, and reads back what they wrote."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
DEADLINE_S = 1500


@dataclass(frozen=True)
class Rank:
    """What one rank wrote about one case."""

    facts: dict[str, Any]
    masters: dict[tuple[str, int], Tensor]
    """(name, start) -> fragment of the fp32 master."""
    live: dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What all ranks wrote about one case."""

    ranks: list[Rank]

    def masters(self) -> dict[str, Tensor]:
        """Assemble whole flat masters from the fragments of all ranks; missing elements are NaN."""
        whole = {name: torch.full((tensor.numel(),), math.nan) for name, tensor in self.ranks[0].live.items()}
        for rank in self.ranks:
            for (name, start), fragment in rank.masters.items():
                whole[name][start : start + fragment.numel()] = fragment
        return whole


Launch = Callable[[int, list[dict[str, Any]]], dict[str, Outcome]]


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference() -> Iterator[ModuleType]:
    """Return the plain single-process side, run on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield _module("reference")
    torch.set_num_threads(threads)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Return a function that runs cases on some ranks and returns each case's outcome."""

    def run(world: int, cases: list[dict[str, Any]]) -> dict[str, Outcome]:
        out = tmp_path_factory.mktemp(f"ranks{world}")
        (out / "cases.json").write_text(json.dumps(cases))
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        processes = []
        for rank in range(world):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            with (out / f"log{rank}.txt").open("w") as log:
                command = [sys.executable, str(HERE / "worker.py"), str(out / "cases.json"), str(out)]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        _wait(processes, out)
        return {case["id"]: Outcome([_read(out / case["id"], rank) for rank in range(world)]) for case in cases}

    return run


def _wait(processes: list[subprocess.Popen[bytes]], out: Path) -> None:
    """Wait for all ranks; when one fails, stop the others and show its log."""
    try:
        for rank, process in enumerate(processes):
            if process.wait(DEADLINE_S):
                raise AssertionError(f"rank {rank} failed:\n{(out / f'log{rank}.txt').read_text()[-4000:]}")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _read(folder: Path, rank: int) -> Rank:
    masters, live = {}, {}
    for key, tensor in load_file(folder / f"rank{rank}.safetensors").items():
        kind, _, name = key.partition("/")
        if kind == "live":
            live[name] = tensor
        else:
            name, _, start = name.partition("@")
            masters[name, int(start)] = tensor
    return Rank(json.loads((folder / f"rank{rank}.json").read_text()), masters, live)
