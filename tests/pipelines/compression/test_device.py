"""Every driver on a second device: nothing meets the CPU on the way, and what comes out is what the CPU makes.

The weight methods one by one are driven there in `tests/contracts/test_compression.py`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from models.compression import registry
from pipelines.compression import run as opening
from pipelines.compression.config import CompressConfig
from pipelines.compression.stage import run
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.stage import StageContext
from tests.fake_device import DEVICE, FakeDevice

SHARED = {"samples": 4, "baseline_documents": 2}
TABLES: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in ("rtn", "gptq", "quik", "wanda", "lq_lora", *registry.names("kv_cache"))},
    **{name: {"method": name, "trials": 2} for name in registry.names("structure")},
    "distill": {"method": "distill", "steps": 0, "baselines": False},
    "search": {"method": "search", "methods": ["gptq"], "bits": [8], "group_sizes": [0], "sequences": 8},
    "layers left alone": {"method": "gptq", "bits": 2, "tolerance": 0.0001},
    "the best calibrator": {"method": "int8", "calibrator": "best"},
    "block reconstruction": {"method": "rtn", "bits": 2, "block_reconstruction": 3, "activations": "int8"},
    "bits by curvature": {"method": "hawq", "sensitivity": "curvature", "budget": 4.0},
    "bits by output errors": {"method": "hawq", "sensitivity": "hessian", "budget": 4.0},
    "token matrices": {"method": "rtn", "embeddings": "quantize"},
    "a trained variant and its baselines": {"method": "paretoq", "bits": 3, "steps": 0},
}


QUICK = {"gptq", "kvquant", "optin", "distill"}
"""One of each kind; the others take minutes together."""
DIFFERENTIATED = {"lq_lora", "kvquant", "block reconstruction", "bits by curvature"}
"""What autograd has a part in, which takes other kernels for the device than for the CPU and so rounds differently.

Squared gradients agree to 6e-6. Where one code rounds the other way because of that, the output error of that layer, in
which single inputs weigh much, moves by percents (6 seen), so it is compared in the mean over layers only.
"""


def numbers(report: Any, path: str = "") -> dict[str, float]:
    """Return every number of a report by its place."""
    if isinstance(report, dict):
        return {k: v for key, part in report.items() for k, v in numbers(part, f"{path}.{key}").items()}
    if isinstance(report, list):
        return {k: v for n, part in enumerate(report) for k, v in numbers(part, f"{path}.{n}").items()}
    return {path: report} if isinstance(report, int | float) else {}


def assert_near(there: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare two reports of the same computation, differently rounded."""
    ours, theirs = (
        {
            place: value
            for place, value in numbers(report).items()
            if not re.search(r"^\.layers\..*output_error$", place)
        }
        for report in (there, expected)
    )
    assert len(ours) > len(numbers(there)) / 2
    assert ours == pytest.approx(theirs, rel=0.02, abs=1e-4)


def compressed(table: dict[str, Any], bench: Bench, folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Run the stage; return the files of the model, and the report."""
    (folder / "out").mkdir(parents=True)
    context = StageContext("compress.x", scratch=folder / "scratch")
    context.scratch.mkdir()
    config = CompressConfig.model_validate(SHARED | table)
    run(config, {"prepare": bench.prepare, "model": bench.parent}, folder / "out", context)
    report = json.loads((folder / "out" / "compression.json").read_text())
    return {path.name: path.read_bytes() for path in (folder / "out" / "model").iterdir()}, report


@dataclass(frozen=True)
class Bench:
    """A base model with its data."""

    prepare: Artifact
    parent: Artifact


@pytest.fixture(scope="module")
def bench(prepared: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """An untrained decoder on the vocabulary of a corpus with documents to compare on."""
    ids = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    sizes = {"width": 32, "layers": 2, "heads": 2, "ffn_width": 48, "init_std": 0.1}
    architecture = ArchitectureConfig.model_validate({"vocab_size": 61, "max_positions": 24, **sizes, **ids})
    folder = tmp_path_factory.mktemp("device") / "build"
    build(architecture, seed=1).save_pretrained(folder / "model")
    names = {"stage": "pretrain", "node": "p", "identity": {}, "parents": {}, "summary": {}}
    return Bench(prepared, artifact.publish(folder, folder.with_name("base"), **names))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run chooses the fake device; in inference mode torch does not ask it for anything, so that is left out."""
    monkeypatch.setattr(opening, "torch_device", lambda _compute: DEVICE)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    # A model that is moved keeps its tied parameters, as on CUDA.
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TABLES])
def test_a_driver_computes_on_the_device_of_its_run(
    name: str, bench: Bench, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The device refuses to meet a tensor of the CPU, as CUDA does, and has the numbers of the CPU."""
    with sdpa_kernel(SDPBackend.MATH):  # as there; the fused kernel rounds otherwise
        expected = compressed(TABLES[name], bench, tmp_path / "cpu")
    assert expected[1]["comparison"]["items"] == 2
    request.getfixturevalue("elsewhere")
    with FakeDevice() as fake:
        there = compressed(TABLES[name], bench, tmp_path / "there")
    assert fake.to_host, "nothing was computed there"
    assert there[0].keys() == expected[0].keys()
    if name in DIFFERENTIATED:
        assert_near(there[1], expected[1])
    else:
        assert there == expected


@pytest.mark.usefixtures("elsewhere")
def test_statistics_stay_on_the_device(bench: Bench, tmp_path: Path) -> None:
    """What comes back is what is stored: no second moment, no weight, no row of inputs."""
    with FakeDevice() as fake:
        compressed({"method": "gpfq", "baseline_documents": 0}, bench, tmp_path)
    hidden, inner, tokens = 32, 48, 4 * 24
    assert not {(hidden, hidden), (inner, inner), (inner, hidden), (hidden, inner)} & set(fake.to_host)
    assert not any(shape and shape[0] == tokens for shape in fake.to_host)
