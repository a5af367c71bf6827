"""What is written about a run while it trains, and how fast it is.

`metrics.jsonl` has one JSON object per logged step, the truth about a run that every other display is fed from. Only
rank 0 writes. After a kill the file is cut back to the step that training resumes at, so each step is there once.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from pipelines.core import artifact
from pipelines.training import peaks

Record = dict[str, Any]

_SIZE = 512
_REPEATS = 8


def read_records(path: Path) -> list[Record]:
    """Return the records of a JSON Lines file; a last line that a kill cut short is left out, a missing file is empty.

    Raises:
        ValueError: a line before the last one is damaged.
    """
    if not path.exists():
        return []
    *whole, rest = path.read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in whole]
    del rest  # empty, or half a line
    return records


class MetricsLog:
    """The file, open for appending.

    Args:
        path: the file; created when missing.
        resume_at: records of this step and later are removed; steps count from 0 as done steps, so the record of the
            update that led to step n has `step` n.
    """

    def __init__(self, path: Path, *, resume_at: int) -> None:
        self._path = path
        self._stream = self._cut(resume_at)

    def _cut(self, step: int) -> TextIO:
        kept = [record for record in read_records(self._path) if record["step"] <= step]
        artifact.write_text(self._path, "".join(_line(record) for record in kept))
        return self._path.open("a", encoding="utf-8")

    def cut_back(self, step: int) -> None:
        """Remove the records of later steps."""
        self._stream.close()
        self._stream = self._cut(step)

    def sync(self) -> None:
        """Force what was written on to the disk; before a checkpoint claims those steps as done."""
        os.fsync(self._stream.fileno())

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record as one line, visible to readers at once."""
        self._stream.write(_line(record))
        self._stream.flush()

    def close(self) -> None:
        """Force the file on to the disk and close it."""
        self.sync()
        self._stream.close()


class Tail:
    """Follows a metrics file that another process writes, also when that process cuts it back and goes on.

    Args:
        path: the file; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset, self._last = 0, b""
        self._step = -1

    def new_records(self) -> list[Record]:
        """Return the complete records that appeared since the last call, each step once."""
        try:
            stream = self._path.open("rb")
        except FileNotFoundError:
            return []
        with stream:
            stream.seek(self._offset - len(self._last))
            if stream.read(len(self._last)) != self._last:  # written anew; its inode may be one that was here before
                self._offset = stream.seek(0)
            text = stream.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        if complete:
            self._last = complete[complete.rfind(b"\n", 0, -1) + 1 :]
        records = [json.loads(line) for line in complete.splitlines()]
        fresh = [record for record in records if record["step"] > self._step]
        self._step = max((record["step"] for record in fresh), default=self._step)
        return fresh


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


# ---- speed -----------------------------------------------------------------------------------------------------------


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
        known = peaks.stated_bf16(torch.cuda.get_device_name(device))
        if known is not None:
            return Peak(known[1], f"stated for {known[0]}, dense bf16")
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

    On a GPU the time is taken by events in its own queue, and read when somebody asks: measuring makes no step wait.

    Args:
        device: whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time of the block as `part`."""
        if not self._on_gpu:
            started = time.perf_counter()
            yield
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - started
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._events.append((part, begin, end))

    def take(self) -> dict[str, float]:
        """Return what was counted, and start again; waits for a GPU to have done it."""
        for part, begin, end in self._events:
            end.synchronize()
            self._seconds[part] = self._seconds.get(part, 0.0) + begin.elapsed_time(end) / 1000
        taken, self._seconds, self._events = self._seconds, {}, []
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
