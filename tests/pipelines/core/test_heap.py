"""Freed tensors leave the process, also where small ones that stay were made between them."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path
import torch
from pipelines.core import heap


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


torch.ones(6 << 20)  # its end raises glibc's own threshold above the size of what follows
before, small = resident(), []
large = []
for _ in range(40):
    large.append(torch.ones(1 << 20))
    small.append(torch.ones(64))
# The last one keeps the end of the heap, so that it cannot shrink.
del large[:-1]
if sys.argv[1] == "trimmed":
    assert heap.trim()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_freed_tensors_leave_the_process() -> None:
    held = {}
    for way in ("trimmed", "left"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        held[way] = int(done.stdout)
    assert held["trimmed"] < 20 << 20
    assert held["left"] > 100 << 20, "or nothing is shown"
