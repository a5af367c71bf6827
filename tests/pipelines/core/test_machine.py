"""The machine of a plan: what is stated stands before what is found, and a machine elsewhere is not this one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.core import machine
from pipelines.core.compute import ComputeConfig
from pipelines.core.machine import Machine, machine_of

GPUS = "NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100 80GB HBM3, 40000\n"


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A driver with two GPUs: a program `nvidia-smi` as the real one answers this query."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{GPUS}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine.gpus_here.cache_clear()
    yield
    machine.gpus_here.cache_clear()


def test_the_ranks_of_a_cpu_share_the_memory_of_the_machine() -> None:
    found = machine_of(ComputeConfig(device="cpu"))
    assert found.shared
    assert found.memory_bytes == machine.ram_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_stated_memory_is_of_a_rank() -> None:
    found = machine_of(ComputeConfig(device="cpu", memory=4.0, peak_tflops=0.5))
    assert (found.memory_bytes, found.shared, found.peak_flops) == (4 * 10**9, False, 5e11)


def test_of_a_machine_elsewhere_nothing_is_known_but_what_is_stated() -> None:
    found = machine_of(ComputeConfig(), elsewhere=True)
    assert found == Machine("cuda", None)
    assert machine_of(ComputeConfig(device="cpu"), elsewhere=True) == Machine("cpu", None)
    assert machine_of(ComputeConfig(memory=80.0), elsewhere=True).memory_bytes == 80 * 10**9


@pytest.mark.usefixtures("gpus")
def test_a_gpu_is_taken_when_there_is_one_and_the_smallest_counts() -> None:
    found = machine_of(ComputeConfig())
    assert (found.device, found.memory_bytes, found.shared) == ("cuda", 40000 << 20, False)
    assert "H100" in found.gpu
    assert found.host_bytes == machine.ram_bytes()
    assert machine_of(ComputeConfig(device="cpu")).device == "cpu"
    assert machine_of(ComputeConfig(), elsewhere=True).memory_bytes is None


@pytest.mark.usefixtures("gpus")
def test_gpus_that_are_hidden_from_processes_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine_of(ComputeConfig()).device == "cpu"
