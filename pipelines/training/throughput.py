"""How fast a run is, and against what: time split, tokens per second, memory, model FLOPs utilisation (MFU)."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_STATED = (("H200", 989.4e12), ("H100", 989.4e12), ("A100", 312e12), ("L40S", 362e12), ("L4", 121e12))
"""Dense bf16 peak of GPUs by a word of their name, operations per second, from NVIDIA's data sheets."""

_SIZE = 512
_REPEATS = 8


@dataclass(frozen=True)
class Peak:
    """The arithmetic that one rank could do at most."""

    flops: float
    """Floating point operations per second."""
    source: str
    """`stated` (data sheet) or `measured` (matrix product of this machine, all ranks at work at once)."""


def peak(device: torch.device, precision: str) -> Peak:
    """Return the peak of this rank's device for `precision`."""
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for word, flops in _STATED:
            if word in name:
                return Peak(flops, f"stated for {word}, dense bf16")
    dtype = torch.bfloat16 if precision == "bf16" and device.type == "cuda" else torch.float32
    return Peak(_measured(device, dtype), f"measured, {_SIZE} x {_SIZE} product in {dtype}")


def memory_bytes(device: torch.device) -> int:
    """Return the most memory that this rank has held: GPU memory on a GPU, resident memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class TimeSplit:
    """Adds up seconds by part of a step.

    Args:
        device: a GPU is waited for at the end of each part, so that its work counts where it belongs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time of the block as `part`."""
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Return what was counted, and start again."""
        taken, self.seconds = self.seconds, {}
        return taken


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    size = _SIZE if device.type == "cpu" else 16 * _SIZE
    left = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
