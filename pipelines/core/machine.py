"""The machine that a plan is for: which device computes, how much memory a rank may take. Without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pipelines.core.compute import ComputeConfig

_CGROUP = Path("/sys/fs/cgroup/memory.max")
_QUERY_S = 10


@dataclass(frozen=True)
class Machine:
    """Where the stages of a plan compute."""

    device: Literal["cpu", "cuda"]
    memory_bytes: int | None
    """Memory that a rank may take on its device, or with `shared` all ranks together; None: not known."""
    memory_name: str = ""
    """How to speak of that memory."""
    shared: bool = False
    """Whether the ranks take from the same memory: processes on the CPU of one machine."""
    host_bytes: int | None = None
    """Memory of the CPU beside a GPU, for all ranks together; None: not known."""
    peak_flops: float | None = None
    """Operations per second of one rank, where they are stated."""
    gpu: str = ""
    """Name of the GPU; empty where it is not known."""
    cores: int | None = None
    """Cores that the ranks share; None: not known, or as many as they want."""


def machine_of(compute: ComputeConfig, *, elsewhere: bool = False) -> Machine:
    """Return the machine that a plan is for.

    Args:
        compute: the section of the recipe; what it states stands before what is found.
        elsewhere: the plan is for a machine that is not this one, of which nothing is known but what `compute` states;
            a GPU for each rank, unless `compute.device` is cpu.
    """
    gpus = [] if elsewhere or compute.device == "cpu" else gpus_here()
    on_gpu = compute.device == "cuda" or (compute.device == "auto" and (elsewhere or bool(gpus)))
    memory, name, shared = None, "", False
    if compute.memory is not None:
        memory, name = round(compute.memory * 1e9), "compute.memory is"
    elif gpus:
        memory, name = min(size for _, size in gpus), f"the {gpus[0][0]} has"
    elif not elsewhere and not on_gpu:
        memory, name, shared = ram_bytes(), "this machine has", True
    return Machine(
        device="cuda" if on_gpu else "cpu",
        memory_bytes=memory,
        memory_name=name,
        shared=shared,
        host_bytes=ram_bytes() if gpus else None,
        peak_flops=None if compute.peak_tflops is None else compute.peak_tflops * 1e12,
        gpu=gpus[0][0] if gpus else "",
        cores=None
        if elsewhere
        else len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    )


def ram_bytes() -> int:
    """Return the memory of this machine, or of the container that this process is in, in bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(_CGROUP.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return total


def gpu_count() -> int:
    """Return how many GPUs processes here may use, as the driver and $CUDA_VISIBLE_DEVICES tell."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(gpus_here()) if listed is None else min(len(gpus_here()), len(listed.split(",")))


@cache
def gpus_here() -> tuple[tuple[str, int], ...]:
    """Return name and memory in bytes of every GPU that processes here may use, as the driver tells them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"} or shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()  # a driver without a device
    rows = [line.rsplit(",", 1) for line in told.splitlines() if "," in line]
    return tuple((name.strip(), int(mebibytes) << 20) for name, mebibytes in rows)
