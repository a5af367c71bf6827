"""Losses against plain statements of what they are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from models.architectures.build import build
from models.architectures.config import IGNORED, ArchitectureConfig
from models.architectures.predict import summed_nats
from models.objectives import registry
from models.objectives.base import ObjectiveContext
from pipelines.training.data_loader import Batch
from pipelines.training.loss_module import LossModule


def architecture(family: str) -> ArchitectureConfig:
    return ArchitectureConfig.model_validate(
        {"family": family, "width": 16, "layers": 2, "heads": 2, "ffn_width": 24, "vocab_size": 31}
        | {"max_positions": 12, "bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    )


def batch_of(family: Any, tokens: Any, first: int = 0) -> Batch:
    """Return the micro batch of the family's own objective; its samples are numbered from `first`."""
    objective = registry.get(registry.default(family))
    made = objective(ObjectiveContext(0, 31, 0, 1, 2, 3), objective.Config())
    return Batch.of(*made.targets(tokens, np.arange(first, first + len(tokens)), np.zeros(len(tokens), int)), 2)


def test_summed_nats_are_minus_the_log_of_the_chance_given_to_each_target() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, IGNORED, 0, 6, IGNORED])
    expected = 0.0
    for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
        if target != IGNORED:
            expected -= math.log(math.exp(row[target]) / sum(math.exp(x) for x in row))
    assert float(summed_nats(logits, targets)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_the_loss_is_the_loss_of_plain_transformers_times_its_targets(family: str) -> None:
    model = build(architecture(family), seed=0)
    tokens = np.arange(24).reshape(2, 12) % 27 + 4
    if family == "decoder":
        batch = batch_of("decoder", tokens)
        plain = model(input_ids=batch.inputs_BT, labels=batch.inputs_BT).loss
    else:
        batch = batch_of("encoder", tokens)
        plain = model(input_ids=batch.inputs_BT, labels=batch.targets_BT).loss
    ours = LossModule(model)(batch.inputs_BT, batch.targets_BT)
    assert ours.item() == pytest.approx(plain.item() * batch.targets, rel=1e-6)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_the_sum_does_not_depend_on_how_a_batch_is_cut(family: str) -> None:
    model = LossModule(build(architecture(family), seed=0))
    tokens = np.arange(48).reshape(4, 12) * 5 % 27 + 4
    tokens[1, 3:] = 2
    whole = batch_of(family, tokens)
    parts = [batch_of(family, tokens[i : i + 1], first=i) for i in range(4)]
    assert whole.targets == sum(part.targets for part in parts)
    together = model(whole.inputs_BT, whole.targets_BT).item()
    assert together == pytest.approx(sum(model(p.inputs_BT, p.targets_BT).item() for p in parts), rel=1e-5)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_a_batch_that_asks_for_nothing_has_no_loss(family: str) -> None:
    inputs = torch.full((1, 12), 5)
    assert LossModule(build(architecture(family), seed=0))(inputs, torch.full((1, 12), IGNORED)).item() == 0.0
    assert Batch.of(np.full((1, 12), 5), np.full((1, 12), IGNORED), 2).targets == 0


@pytest.mark.parametrize("family", ["decoder", "encoder"])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_a_loss_in_chunks_has_the_value_and_the_gradients_of_the_whole(family: str, chunk: int) -> None:
    batch = batch_of(family, np.arange(48).reshape(4, 12) * 5 % 27 + 4)
    found = []
    for limit in (None, chunk):
        objective = LossModule(build(architecture(family), seed=0), limit)
        loss = objective(batch.inputs_BT, batch.targets_BT)
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in objective.named_parameters()}))
    (whole, gradients), (parts, chunked) = found
    assert parts == pytest.approx(whole, rel=1e-6)
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(chunked[name], gradient, rtol=0, atol=1e-5 * scale + 1e-7)


def test_a_loss_in_chunks_never_holds_more_logits_than_a_chunk() -> None:
    objective = LossModule(build(architecture("decoder"), seed=0), 3)
    heights: list[int] = []
    objective.model.lm_head.register_forward_hook(lambda _module, _inputs, logits: heights.append(len(logits)))
    batch = batch_of("decoder", np.arange(24).reshape(2, 12) % 27 + 4)
    objective(batch.inputs_BT, batch.targets_BT).backward()
    assert max(heights) == 3
    assert sum(heights) == 2 * batch.targets  # once in the forward pass, once more in the backward pass


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_model_computes_the_same_and_keeps_its_names() -> None:
    plain, compiled = (LossModule(build(architecture("decoder"), seed=0)) for _ in range(2))
    compiled.compile_model()
    batch = batch_of("decoder", np.arange(24).reshape(2, 12) % 27 + 4)
    losses = []
    for objective in (plain, compiled):
        loss = objective(batch.inputs_BT, batch.targets_BT)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, one), (other_name, other) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        assert name == other_name
        torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=1e-4 * float(one.grad.abs().max()) + 1e-6)
