"""Squared gradients, recorded block by block, against plain autograd through the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.compression import calibration, sensitivity, sequential
from pipelines.core.errors import NumericError
from pipelines.modelio import meta_init
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model

CPU = torch.device("cpu")


def recorded(source: Path, prepare: Path, folder: Path, *, samples: int, masked: bool) -> dict[str, Tensor]:
    """Return the squared gradients of every layer of the model in `source`."""
    model = meta_init.build(source)
    names = sequential.targets(model, ())
    tokens = calibration.sample_tokens(prepare, samples=samples, seed=0, masked=masked)
    labels = calibration.labels(prepare, tokens, seed=0, masked=masked)
    sensitivity.record(model, WeightReader(source), names, tokens, labels, folder=folder, device=CPU)
    _, layers = meta_init.blocks(model)
    assert all(parameter.is_meta for parameter in layers.parameters()), "blocks are released"
    return {k: v for index in range(len(layers)) for k, v in sensitivity.read(folder, index).items()}


def slow(source: Path, prepare: Path, *, samples: int, masked: bool) -> dict[str, Tensor]:
    """Return the same by one backward pass of the whole model for each sequence."""
    model = load_model(source)
    names = sequential.targets(model, ())
    tokens = calibration.sample_tokens(prepare, samples=samples, seed=0, masked=masked)
    plain = calibration.sample_tokens(prepare, samples=samples, seed=0, masked=False)
    sums = {name: torch.zeros_like(model.get_parameter(f"{name}.weight")) for name in names}
    for shown, original in zip(torch.from_numpy(tokens), torch.from_numpy(plain), strict=True):
        for name in names:
            model.get_parameter(f"{name}.weight").requires_grad_().grad = None
        losses = torch.nn.functional.cross_entropy
        logits = model(input_ids=shown[None]).logits[0]
        if masked:
            hidden = shown != original
            losses(logits[hidden], original[hidden], reduction="sum").backward()
        else:
            losses(logits[:-1], original[1:], reduction="sum").backward()
        for name in names:
            sums[name] += model.get_parameter(f"{name}.weight").grad.square()
    return sums


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_squares_are_those_of_one_backward_pass_a_sequence(family: str, small: Any, tmp_path: Path) -> None:
    bench, masked = small(family=family, layers=3), family == "encoder"
    source, prepare = bench.parent.path / "model", bench.prepare.path
    mine = recorded(source, prepare, tmp_path / "fisher", samples=6, masked=masked)
    expected = slow(source, prepare, samples=6, masked=masked)
    assert mine.keys() == expected.keys()
    for name, square in expected.items():
        assert float(square.max()) > 0
        assert torch.allclose(mine[name], square, rtol=1e-3, atol=1e-5 * float(square.max())), name


def test_only_squares_are_left_in_the_folder(small: Any, tmp_path: Path) -> None:
    bench = small()
    recorded(bench.parent.path / "model", bench.prepare.path, tmp_path, samples=4, masked=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block-0.safetensors", "block-1.safetensors"]


def test_labels_of_an_encoder_are_the_hidden_tokens(small: Any) -> None:
    prepare = small().prepare.path
    shown = calibration.sample_tokens(prepare, samples=12, seed=5, masked=True)
    labels = calibration.labels(prepare, shown, seed=5, masked=True)
    plain = calibration.sample_tokens(prepare, samples=12, seed=5, masked=False)
    assert np.array_equal(np.where(labels == calibration.IGNORED, shown, labels), plain)
    assert np.array_equal(labels != calibration.IGNORED, shown == 259)


def test_labels_of_a_decoder_are_the_next_tokens(small: Any) -> None:
    tokens = calibration.sample_tokens(small().prepare.path, samples=3, seed=5, masked=False)
    labels = calibration.labels(small().prepare.path, tokens, seed=5, masked=False)
    assert np.array_equal(labels[:, :-1], tokens[:, 1:])
    assert (labels[:, -1] == calibration.IGNORED).all()


def test_a_gradient_that_overflows_is_named(small: Any, tmp_path: Path) -> None:
    bench = small()
    source = tmp_path / "model"
    source.mkdir()
    for path in (bench.parent.path / "model").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError, match=r"layers\.1\.\S+: a gradient"):
        recorded(source, bench.prepare.path, tmp_path / "fisher", samples=2, masked=False)
