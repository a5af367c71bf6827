"""Compress a model, or load it whole, under a limit on the memory of this process; a test runs this by path.

Usage: python bounded_child.py compress|load SMALL PARENT PREPARE OUT BYTES. Memory may grow by BYTES from where it
stands after the same work on the model SMALL, which imports all that is needed.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from pipelines.compression import stage
from pipelines.compression.config import CompressConfig
from pipelines.core import artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.stage import StageContext
from pipelines.modelio.folder import WeightWriter
from pipelines.modelio.load import load_model


def data_bytes() -> int:
    """Return the private writable memory of this process, which RLIMIT_DATA bounds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmData")))


def act(action: str, parent: Path, prepare: Path, out: Path) -> None:
    """Load the model, or compress it."""
    if action == "load":
        load_model(parent / "model")
        return
    config = CompressConfig.model_validate({"method": "gptq", "clip": "max", "samples": 8, "baseline_documents": 0})
    inputs = {"model": artifact.load(parent), "prepare": artifact.load(prepare)}
    out.mkdir()
    stage.run(config, inputs, out, StageContext(node="compress.x", scratch=out, compute=ComputeConfig(device="cpu")))


def main() -> None:
    """Do it with a small model, set the limit, then do it with the one that is asked for."""
    action, small, parent, prepare, out, room = sys.argv[1:]
    torch.set_num_threads(1)
    WeightWriter.__init__.__defaults__ = ("model", 1 << 20)  # not up to 1 GiB a shard
    act(action, Path(small), Path(prepare), Path(out) / "small")
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + int(room),) * 2)
    act(action, Path(parent), Path(prepare), Path(out) / "large")


main()
