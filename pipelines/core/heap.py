"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import sys

LARGE = 1 << 20
"""Bytes from which an allocation goes back to the system as soon as it is freed."""
_M_MMAP_THRESHOLD = -3


def return_large_blocks() -> bool:
    """Let freed tensors of `LARGE` bytes and more go back to the system; returns whether the C library can.

    glibc raises its threshold to the size of the first large block that is freed, up to 32 MiB. From then on smaller
    ones are cut from one heap, which work block by block leaves full of holes: rounding 311 M parameters, of which one
    block of 51 MB is alive at a time, so reached 1.8 GB. A process keeps the setting for as long as it lives.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, LARGE))
