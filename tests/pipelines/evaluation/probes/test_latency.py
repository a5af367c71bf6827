"""The probe in a real process: plausible numbers, faults as transient errors, nothing left behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.core.artifact import Artifact
from pipelines.core.errors import TransientError
from pipelines.core.program import ROOT as CHECKOUT
from pipelines.evaluation.probes import latency
from pipelines.evaluation.probes.latency import LatencySettings

QUICK = LatencySettings(prompt_tokens=32, new_tokens=4, repeats=2)


def test_a_decoder_has_prefill_decode_and_memory(decoder_artifact: Artifact) -> None:
    found = latency.measure(decoder_artifact.path / "model", QUICK)
    # One token at a time repeats the overhead of every layer for each token: decode is dearer per token.
    assert 0.0 < found["prefill_ms_per_token"] < found["decode_ms_per_token"] < 1000.0
    weights = (decoder_artifact.path / "model" / "model.safetensors").stat().st_size
    assert weights < found["model_memory_bytes"] < found["peak_memory_bytes"]
    assert found["load_s"] > 0.0
    assert found["threads"] >= 1


def test_an_encoder_has_no_decode(encoder_artifact: Artifact) -> None:
    found = latency.measure(encoder_artifact.path / "model", QUICK)
    assert found["decode_ms_per_token"] is None
    assert found["prefill_ms_per_token"] > 0.0


def test_peak_memory_follows_what_this_process_allocates() -> None:
    code = (
        "from pipelines.evaluation.probes.latency import peak_memory; before = peak_memory(); x = bytearray(100 << 20);"
        "x[::4096] = b'x' * len(x[::4096]); print(peak_memory() - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 90 << 20 < grown < 130 << 20


def test_peak_memory_of_a_process_is_not_that_of_the_one_that_started_it() -> None:
    """The kernel's own counter for a process is inherited over fork and exec; ours must not be."""
    ballast = bytearray(300 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from pipelines.evaluation.probes.latency import peak_memory; print(peak_memory())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert child < 200 << 20 < len(ballast)


def test_a_model_that_does_not_load_is_reported_with_the_end_of_its_error(tmp_path: Path) -> None:
    with pytest.raises(TransientError, match=r"(?s)ended with exit code 1: .*config\.json"):
        latency.measure(tmp_path, QUICK)


def test_a_probe_that_takes_too_long_is_given_up(decoder_artifact: Artifact) -> None:
    with pytest.raises(TransientError, match=r"did not end in 0\.2 s"):
        latency.measure(decoder_artifact.path / "model", LatencySettings(timeout_s=0.2))
    running = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    assert not [command for command in running if "evaluation.probes.latency" in command]


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_killing_the_stage_kills_its_probe(decoder_artifact: Artifact, tmp_path: Path) -> None:
    shutil.copytree(decoder_artifact.path / "model", tmp_path / "model")
    code = (
        "from pathlib import Path; from pipelines.evaluation.probes import latency;"
        "from pipelines.evaluation.probes.latency import LatencySettings;"
        f"latency.measure(Path({str(tmp_path / 'model')!r}), LatencySettings(repeats=1000, new_tokens=1000))"
    )
    stage = subprocess.Popen([sys.executable, "-c", code], cwd=CHECKOUT)
    process = psutil.Process(stage.pid)
    deadline = time.monotonic() + 60
    while not (children := process.children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    stage.kill()
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert len(gone) == 1
    assert alive == []
    stage.wait()
