"""The examples of docs/contributing.md are found and work: a new file each, and nothing else touched."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import models.compression
from models.compression import registry
from models.compression.base import Statistics
from pipelines.evaluation import probe, probes
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
