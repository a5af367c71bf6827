"""The examples of docs/contributing.md are found and work: a new file each, and nothing else touched."""

from __future__ import annotations

import ast
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
from tests.docs.pages import read


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
        assert packed.stored_bits() == 4 * 8 + 2 * 32
        assert registry.describe("toy_signs")["kind"] == "weight"
    finally:
        for cached in (registry._methods, registry._modules, registry._method):
            cached.cache_clear()


def test_the_probe_is_found_by_its_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_parameters.py").write_text(example("Number of parameters"), encoding="utf-8")
    monkeypatch.setattr(probes, "__path__", [*probes.__path__, str(tmp_path)])
    assert "toy_parameters" in probe.names()
    assert probe.get("toy_parameters").name == "toy_parameters"
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
