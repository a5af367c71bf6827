"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import sys


def trim() -> bool:
    """Give memory that is free inside the process back to the system; returns whether the C library can.

    glibc cuts tensors of up to 32 MiB from one heap, which work block by block leaves full of holes: rounding 311 M
    parameters, of which one block of 51 MB is alive at a time, so reached 1.8 GB of resident memory. Trimming costs one
    call a block. A low threshold for mapped allocations (`M_MMAP_THRESHOLD`) makes every tensor pay in page faults.
    """
    if not sys.platform.startswith("linux"):
        return False
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if malloc_trim is None:
        return False
    malloc_trim(0)
    return True
