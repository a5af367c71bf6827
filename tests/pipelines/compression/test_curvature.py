"""Hutchinson's estimate against the exact trace of the Hessian of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines.compression import calibration, curvature
from pipelines.core.errors import NumericError
from pipelines.modelio.load import load_model

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


@pytest.fixture(scope="module")
def asked(small: Any) -> tuple[Path, Any, Any]:
    """A decoder of one layer with width 8, twelve sequences, and their next tokens."""
    folder = small(width=8, layers=1, heads=2, ffn_width=8, init_std=0.6).parent.path / "model"
    tokens = np.random.default_rng(0).integers(0, 256, (12, 10))
    labels = np.concatenate([tokens[:, 1:], np.full((12, 1), calibration.IGNORED)], axis=1)
    return folder, tokens, labels


def exact(folder: Path, name: str, tokens: Any, labels: Any) -> float:
    """Return the mean diagonal entry of the Hessian of the mean loss, by the whole Hessian."""
    model = load_model(folder)
    weight = model.get_parameter(f"{name}.weight").detach()
    wanted = torch.from_numpy(labels).flatten()

    def loss(value: torch.Tensor) -> torch.Tensor:
        parameters = {f"{name}.weight": value}
        logits = torch.func.functional_call(model, parameters, kwargs={"input_ids": torch.from_numpy(tokens)}).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=calibration.IGNORED)

    with sdpa_kernel(SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, weight)
    return float(hessian.reshape(weight.numel(), weight.numel()).diagonal().mean())


def test_the_estimate_is_right_within_its_own_standard_error(asked: Any) -> None:
    folder, tokens, labels = asked
    runs = [
        curvature.traces(folder, NAMES, tokens, labels, probes=30, seed=seed, device=torch.device("cpu"))
        for seed in range(8)
    ]
    sharp = []
    for name in NAMES:
        values = np.array([run[name] for run in runs])
        truth, spread = exact(folder, name, tokens, labels), values.std(ddof=1) / len(values) ** 0.5
        assert abs(values.mean() - truth) < 3 * spread
        sharp.append(spread < 0.2 * abs(truth))
    assert any(sharp), "an estimate that is nothing but noise would pass too"


def test_probes_repeat_by_seed(asked: Any) -> None:
    folder, tokens, labels = asked
    one, same, other = (
        curvature.traces(folder, NAMES, tokens, labels, probes=1, seed=seed, device=torch.device("cpu"))
        for seed in (0, 0, 1)
    )
    assert one == same
    assert one != other


def test_weights_that_overflow_are_named(asked: Any, tmp_path: Path) -> None:
    folder, tokens, labels = asked
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights[f"{NAMES[1]}.weight"][0, 0] = float("inf")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError, match=r"layers\.0.*second derivative"):
        curvature.traces(tmp_path, NAMES, tokens, labels, probes=1, seed=0, device=torch.device("cpu"))
