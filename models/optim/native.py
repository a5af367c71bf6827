"""The two passes of LAMB and LARS on a CPU in compiled C++ (`native.cpp`): all tensors in one call each.

Compiled at first use, in about a second, for this machine's processor, and kept in the user's cache folder under a name
made of source, flags and processor. `CXX` names another compiler than g++.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["lamb", "lars"]

_SOURCE = Path(__file__).with_name("native.cpp")
# Not -ffast-math: a library linked with it would switch off denormal numbers in the whole process.
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", "-ffp-contract=fast"]
_FLAGS += ["-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]


def measure(
    rule: Rule, arrays: Sequence[Sequence[Tensor]], scalars: Sequence[Sequence[float]], adapted: Sequence[bool]
) -> Tensor:
    """Return the sums of squares [tensors, 3] of gradient, update and weights, float64.

    Args:
        rule: whose update.
        arrays: for each tensor the weights, the gradient and the moments: contiguous float32 on the CPU.
        scalars: for each tensor the numbers of the rule, the last of them (the rate) unused.
        adapted: for each tensor whether update and weights are measured; otherwise their sums are 0.

    Raises:
        RuntimeError: no C++ compiler, or it fails; with its message.
    """
    result = torch.zeros(len(arrays), 3, dtype=torch.float64)
    _call(f"measure_{rule}", arrays, scalars, adapted, [ctypes.c_void_p(result.data_ptr())])
    return result


def apply(rule: Rule, arrays: Sequence[Sequence[Tensor]], scalars: Sequence[Sequence[float]]) -> None:
    """Update weights and moments in place; the arguments are those of `measure`, rates included.

    Raises:
        RuntimeError: no C++ compiler, or it fails; with its message.
    """
    _call(f"apply_{rule}", arrays, scalars, [True] * len(arrays), [])


def _call(
    name: str,
    arrays: Sequence[Sequence[Tensor]],
    scalars: Sequence[Sequence[float]],
    adapted: Sequence[bool],
    results: list[ctypes.c_void_p],
) -> None:
    rows = [
        (*(array.data_ptr() for array in row), row[0].numel(), whole)
        for row, whole in zip(arrays, adapted, strict=True)
    ]
    table, numbers = torch.tensor(rows, dtype=torch.int64), torch.tensor(scalars, dtype=torch.float32)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (table, numbers)]
    count, threads = ctypes.c_int64(len(rows)), ctypes.c_int64(torch.get_num_threads())
    getattr(_library(), name)(pointers[0], count, pointers[1], *results, threads)


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "g++")
    key = hashlib.sha256("\0".join([_SOURCE.read_text(), compiler, *_FLAGS, _processor()]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ingot"
    path = folder / f"optim-{key}.so"
    if not path.exists():
        if shutil.which(compiler) is None:
            raise RuntimeError(
                f"compiled=True needs a C++ compiler and {compiler} is not found: install one, name one in CXX, or "
                "leave compiled=False"
            )
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f"{path.name}.{os.getpid()}"
        done = subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(fresh)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{compiler} could not compile {_SOURCE.name}: {done.stderr[-1000:]}")
        fresh.replace(path)  # whole or not at all: other ranks compile at the same time
    return ctypes.CDLL(str(path))


def _processor() -> str:
    """Return what -march=native depends on."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
