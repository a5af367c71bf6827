"""Time split, memory and the peak that MFU is taken against."""

from __future__ import annotations

import time

import pytest
import torch

from pipelines.training.throughput import TimeSplit, memory_bytes, peak

CPU = torch.device("cpu")


def spin(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def test_time_is_added_up_by_part_and_taken_once() -> None:
    split = TimeSplit(CPU)
    for part, seconds in (("data", 0.01), ("forward", 0.02), ("data", 0.01)):
        with split(part):
            spin(seconds)
    taken = split.take()
    assert set(taken) == {"data", "forward"}
    assert taken["data"] >= 0.02
    assert taken["forward"] >= 0.02
    assert split.take() == {}


def test_memory_counts_what_was_held_at_most() -> None:
    before = memory_bytes(CPU)
    block = torch.ones(max(before, 1 << 28) // 4 + (1 << 24))
    del block
    assert memory_bytes(CPU) >= before
    assert 1 << 20 < before < 1 << 42


def test_the_peak_of_a_cpu_is_measured_and_says_so() -> None:
    found = peak(CPU, "fp32")
    assert found.source.startswith("measured")
    assert 1e8 < found.flops < 1e14


def test_a_plain_product_reaches_no_more_than_about_the_peak() -> None:
    found = peak(CPU, "fp32")
    left = torch.ones(256, 256)
    started = time.perf_counter()
    for _ in range(20):
        left @ left
    assert 20 * 2 * 256**3 / (time.perf_counter() - started) < 3 * found.flops


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_known_gpu_has_a_stated_peak() -> None:
    assert peak(torch.device("cuda", 0), "bf16").flops > 1e13
