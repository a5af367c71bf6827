"""The examples of docs/contributing.md are found and work: a new file each, and nothing else touched."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import models.compression
import models.objectives
import pipelines.training.monitors
from models.compression import registry
from models.compression.base import Statistics
from models.objectives import registry as objectives
from models.objectives.base import IGNORED, NoSettings, ObjectiveContext
from pipelines.evaluation import probe, probes
from pipelines.training.monitors import registry as monitors
from tests.docs.pages import CHECKOUT, read

FILES = {
    "models/compression/toy_signs.py": "Keep the sign",
    "tests/models/compression/test_toy_signs.py": "Signs, against",
    "models/objectives/toy_ahead.py": "Predict the token two",
    "pipelines/training/monitors/toy_bound.py": "Refuse a step whose loss",
    "pipelines/evaluation/probes/toy_first_choice.py": "How often a decoder's first",
    "tests/pipelines/evaluation/probes/test_toy_first_choice.py": "The share of first choices",
}
"""Where a reader would put the examples -> how their docstrings begin."""


def example(summary: str) -> str:
    """Return the Python block whose docstring begins so."""
    blocks = read("docs/contributing.md").blocks("python")
    (block,) = [b for b in blocks if (ast.get_docstring(ast.parse(b)) or "").startswith(summary)]
    return block


def test_the_weight_method_is_found_by_its_file_name_and_compresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy_signs.py").write_text(example("Keep the sign"), encoding="utf-8")
    monkeypatch.setattr(models.compression, "__path__", [*models.compression.__path__, str(tmp_path)])
    for cached in (registry._methods, registry._modules, registry._method):
        cached.cache_clear()
    try:
        method = registry.weight("toy_signs")
        weight = torch.tensor([[1.0, -2.0], [3.0, 5.0]])
        packed = method.compress(weight, Statistics(), method.Config())
        assert packed.dequantize().tolist() == [[1.5, -1.5], [4.0, 4.0]]
        assert method.restore(packed.tensors(), method.Config()).dequantize().equal(packed.dequantize())
        assert packed.stored_bits() == 2 * 8 + 2 * 32 + 2 * 64
        assert registry.describe("toy_signs")["kind"] == "weight"
    finally:
        for cached in (registry._methods, registry._modules, registry._method):
            cached.cache_clear()


def test_the_probe_is_found_by_its_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_first_choice.py").write_text(example("How often a decoder's first"), encoding="utf-8")
    monkeypatch.setattr(probes, "__path__", [*probes.__path__, str(tmp_path)])
    assert "toy_first_choice" in probe.names()
    assert probe.get("toy_first_choice").name == "toy_first_choice"
    probe.get.cache_clear()


def test_the_objective_is_found_by_its_file_name_and_gives_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy_ahead.py").write_text(example("Predict the token two"), encoding="utf-8")
    monkeypatch.setattr(models.objectives, "__path__", [*models.objectives.__path__, str(tmp_path)])
    assert "toy_ahead" in objectives.names()
    context = ObjectiveContext(seed=0, vocab_size=9, bos_id=0, eos_id=1, pad_id=2, mask_id=3)
    objective = objectives.get("toy_ahead")(context, NoSettings())
    tokens, numbers = np.array([[4, 5, 6, 2]]), np.zeros(1, dtype=np.int64)
    inputs, targets = objective.targets(tokens, numbers, numbers)
    assert inputs.tolist() == tokens.tolist()
    assert targets.tolist() == [[6, IGNORED, IGNORED, IGNORED]]


def test_the_monitor_is_found_by_its_file_name_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_bound.py").write_text(example("Refuse a step whose loss"), encoding="utf-8")
    package = pipelines.training.monitors
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    assert "toy_bound" in monitors.names()
    monitor = monitors.make({"toy_bound": {"nats": 3.0}})["toy_bound"]
    assert monitor.refuses(2.0) is None
    assert monitor.refuses(4.0) == "the loss is 4"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which somebody has put the examples where the page says, and done nothing else."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("flows", "models", "pipelines", "tests"):
        shutil.copytree(CHECKOUT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "pyproject.toml", root)
    for path, summary in FILES.items():
        (root / path).write_text(example(summary).replace("NAME", _name(path)), encoding="utf-8")
    return root


def _name(path: str) -> str:
    return Path(path).stem.removeprefix("test_")


def _run(checkout: Path, *module: str) -> str:
    """Run a Python module there and return what it prints; it must end well."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", *module]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_linter_has_nothing_to_say_of_the_examples(checkout: Path) -> None:
    _run(checkout, "ruff", "check", *FILES)
    _run(checkout, "ruff", "format", "--check", *FILES)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_examples_pass_the_contract_tests_and_their_own(checkout: Path) -> None:
    """By the command of the page; `toy_` begins the name of each."""
    (shown,) = [line for line in read("docs/contributing.md").lines() if " -k NAME" in line]
    command = shlex.split(shown.replace("NAME", "toy_"))
    assert command[:3] == [".venv/bin/python", "-m", "pytest"]
    own = [path for path in FILES if path.startswith("tests/")]
    passed = [line for line in _run(checkout, *command[2:], *own, "-rA").splitlines() if line.startswith("PASSED")]
    members = sorted({_name(path) for path in FILES})
    assert [name for name in members if not any(f"{name}]" in line or f"[{name}" in line for line in passed)] == []
    assert [path for path in own if not any(path in line for line in passed)] == []
