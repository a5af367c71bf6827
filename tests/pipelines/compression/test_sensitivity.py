"""Squared gradients against plain autograd through the whole model; curvature against the trace of a tiny Hessian."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.architectures.config import IGNORED
from pipelines.compression import calibration, sensitivity, sequential
from pipelines.compression.calibration import Batch
from pipelines.compression.run import CompressionRun
from pipelines.core import artifact
from pipelines.core.errors import NumericError
from pipelines.data.shards import ShardReader
from pipelines.modelio import meta_init
from pipelines.modelio.load import load_model


def recorded(run: CompressionRun) -> dict[str, Tensor]:
    """Return the squared gradients of every layer of the base model."""
    sensitivity.record(run, sequential.targets(run.base, ()))
    _, layers = meta_init.blocks(run.base)
    assert all(parameter.is_meta for parameter in layers.parameters()), "blocks are released"
    return {k: v for index in range(len(layers)) for k, v in sensitivity.read(run.fisher, index, run.device).items()}


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
def test_squares_are_those_of_one_backward_pass_a_sequence(family: str, small: Any, opened: Any) -> None:
    run = opened(small(family=family, layers=3), {"method": "lq_lora", "samples": 6})
    mine = recorded(run)
    expected = slow(run.source, run.prepare, samples=6, masked=family == "encoder")
    assert mine.keys() == expected.keys()
    for name, square in expected.items():
        assert float(square.max()) > 0
        assert torch.allclose(mine[name], square, rtol=1e-3, atol=1e-5 * float(square.max())), name


def test_only_squares_are_left_in_the_folder(small: Any, opened: Any) -> None:
    run = opened(small(), {"method": "lq_lora", "samples": 4})
    recorded(run)
    assert sorted(path.name for path in run.fisher.iterdir()) == ["block-0.safetensors", "block-1.safetensors"]


def test_labels_of_an_encoder_are_the_hidden_tokens(small: Any) -> None:
    prepare = small().prepare.path
    shown = calibration.sample_tokens(prepare, samples=12, seed=5, masked=True)
    labels = calibration.labels(prepare, shown, seed=5, masked=True)
    plain = calibration.sample_tokens(prepare, samples=12, seed=5, masked=False)
    assert np.array_equal(np.where(labels == IGNORED, shown, labels), plain)
    assert np.array_equal(labels != IGNORED, shown == 259)


def test_labels_of_a_decoder_are_the_next_tokens(small: Any) -> None:
    tokens = calibration.sample_tokens(small().prepare.path, samples=3, seed=5, masked=False)
    labels = calibration.labels(small().prepare.path, tokens, seed=5, masked=False)
    assert np.array_equal(labels[:, :-1], tokens[:, 1:])
    assert (labels[:, -1] == IGNORED).all()


def test_nothing_is_asked_where_the_next_token_is_padding(small: Any) -> None:
    prepare = small().prepare.path
    pad = ShardReader(prepare, "train").index["pad_id"]
    labels = calibration.labels(prepare, np.array([[7, 8, pad, pad]]), seed=5, masked=False)
    assert labels.tolist() == [[8, IGNORED, IGNORED, IGNORED]]


def test_a_gradient_that_overflows_is_named(small: Any, opened: Any, tmp_path: Path) -> None:
    bench = small()
    folder = tmp_path / "build"
    shutil.copytree(bench.parent.path / "model", folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    names = {"stage": "pretrain", "node": "p", "identity": {}, "parents": {}, "summary": {}}
    broken = artifact.publish(folder, tmp_path / "broken", **names)
    with pytest.raises(NumericError, match=r"layers\.1\.\S+: a gradient"):
        recorded(opened(bench, {"method": "lq_lora", "samples": 2}, parent=broken))


# ---- curvature --------------------------------------------------------------------------------------------------

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


@pytest.fixture(scope="module")
def asked(small: Any) -> tuple[Path, Any, Any]:
    """A decoder of one layer with width 8, twelve sequences, and their next tokens."""
    folder = small(width=8, layers=1, heads=2, ffn_width=8, init_std=0.6).parent.path / "model"
    tokens = np.random.default_rng(0).integers(0, 256, (12, 10))
    labels = np.concatenate([tokens[:, 1:], np.full((12, 1), IGNORED)], axis=1)
    return folder, tokens, labels


def exact(folder: Path, name: str, tokens: Any, labels: Any) -> float:
    """Return the mean diagonal entry of the Hessian of the mean loss, by the whole Hessian."""
    model = load_model(folder)
    weight = model.get_parameter(f"{name}.weight").detach()
    wanted = torch.from_numpy(labels).flatten()

    def loss(value: torch.Tensor) -> torch.Tensor:
        parameters = {f"{name}.weight": value}
        logits = torch.func.functional_call(model, parameters, kwargs={"input_ids": torch.from_numpy(tokens)}).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=IGNORED)

    with sdpa_kernel(SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, weight)
    return float(hessian.reshape(weight.numel(), weight.numel()).diagonal().mean())


def test_the_estimate_is_right_within_its_own_standard_error(asked: Any) -> None:
    folder, tokens, labels = asked
    runs = [
        sensitivity.traces(load_model(folder), NAMES, [Batch(tokens, labels)], probes=30, seed=seed)
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
        sensitivity.traces(load_model(folder), NAMES, [Batch(tokens, labels)], probes=1, seed=seed)
        for seed in (0, 0, 1)
    )
    assert one == same
    assert one != other


def test_weights_that_overflow_are_named(asked: Any, tmp_path: Path) -> None:
    folder, tokens, labels = asked
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights[f"{NAMES[1]}.weight"].fill_(3e38)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError, match=r"layers\.0.*second derivative"):
        sensitivity.traces(load_model(tmp_path), NAMES, [Batch(tokens, labels)], probes=1, seed=0)
