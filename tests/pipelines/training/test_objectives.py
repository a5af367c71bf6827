"""Targets and losses against plain statements of what they are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from models.architectures.predict import summed_nats
from pipelines.training.config import MaskingConfig
from pipelines.training.objectives import (
    IGNORED,
    Batch,
    CausalTask,
    MaskedTask,
    Objective,
    causal_targets,
    hide_tokens,
)

SPECIAL = (0, 1, 2, 3)
RULE = MaskingConfig()


def architecture(family: str) -> ArchitectureConfig:
    return ArchitectureConfig.model_validate(
        {"family": family, "width": 16, "layers": 2, "heads": 2, "ffn_width": 24, "vocab_size": 31}
        | {"max_positions": 12, "bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    )


def hide(tokens: list[int], **changes: Any) -> tuple[list[int], list[int]]:
    values = {"seed": 1, "sample": 2, "epoch": 0, "rule": RULE, "vocab_size": 500, "special": SPECIAL}
    shown, targets = hide_tokens(np.array(tokens), **{**values, **changes})
    return shown.tolist(), targets.tolist()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_a_causal_target_is_the_next_token_unless_that_is_padding(tokens: list[int]) -> None:
    targets = causal_targets(np.array([tokens]), pad_id=2)[0].tolist()
    for position, target in enumerate(targets):
        following = tokens[position + 1] if position + 1 < len(tokens) else 2
        assert target == (IGNORED if following == 2 else following)


def test_hidden_tokens_are_a_function_of_seed_sample_and_epoch() -> None:
    tokens = list(range(4, 104))
    first = hide(tokens)
    assert hide(tokens) == first
    assert all(hide(tokens, **{key: 9}) != first for key in ("seed", "sample", "epoch"))


def test_a_prefix_is_hidden_alike_whatever_its_neighbours_are() -> None:
    same = hide([5] * 60, vocab_size=500)[1]
    other = hide([7] * 60, vocab_size=500)[1]
    assert [t == IGNORED for t in same] == [t == IGNORED for t in other]


def test_special_tokens_are_never_targets() -> None:
    tokens = [0, 1, 2, 3] * 50
    shown, targets = hide(tokens)
    assert shown == tokens
    assert set(targets) == {IGNORED}


def test_the_shares_of_masking_are_those_of_the_rule() -> None:
    rule = MaskingConfig(probability=0.25, mask=0.6, random=0.3)
    tokens = [7] * 40_000
    shown, targets = hide(tokens, rule=rule, vocab_size=5000)
    chosen = [s for s, t in zip(shown, targets, strict=True) if t != IGNORED]
    assert len(chosen) / len(tokens) == pytest.approx(0.25, abs=0.01)
    assert chosen.count(3) / len(chosen) == pytest.approx(0.6, abs=0.02)
    assert chosen.count(7) / len(chosen) == pytest.approx(0.1, abs=0.02)
    assert len(set(chosen)) > 1000
    assert all(s == 7 for s, t in zip(shown, targets, strict=True) if t == IGNORED)


def test_all_targets_can_be_masked() -> None:
    shown, targets = hide([9] * 200, rule=MaskingConfig(mask=1.0, random=0.0))
    assert {s for s, t in zip(shown, targets, strict=True) if t != IGNORED} == {3}


def test_a_masked_batch_hides_each_sequence_by_its_own_stream() -> None:
    task = MaskedTask(RULE, 1, 500, SPECIAL)
    tokens = np.full((2, 50), 9)
    batch = task.batch(tokens, np.array([2, 8]), np.array([0, 5]))
    for row, (sample, epoch) in enumerate([(2, 0), (8, 5)]):
        shown, targets = hide([9] * 50, sample=sample, epoch=epoch)
        assert batch.inputs_BT[row].tolist() == shown
        assert batch.targets_BT[row].tolist() == targets
    assert batch.targets == sum(t != IGNORED for t in batch.targets_BT.flatten().tolist())


def test_summed_nats_are_minus_the_log_of_the_chance_given_to_each_target() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, IGNORED, 0, 6, IGNORED])
    expected = 0.0
    for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
        if target != IGNORED:
            expected -= math.log(math.exp(row[target]) / sum(math.exp(x) for x in row))
    assert float(summed_nats(logits, targets)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_the_objective_is_the_loss_of_plain_transformers_times_its_targets(family: str) -> None:
    model = build(architecture(family), seed=0)
    tokens = np.arange(24).reshape(2, 12) % 27 + 4
    if family == "decoder":
        batch = CausalTask(2).batch(tokens, np.arange(2), np.zeros(2, int))
        plain = model(input_ids=batch.inputs_BT, labels=batch.inputs_BT).loss
    else:
        batch = MaskedTask(RULE, 0, 31, SPECIAL).batch(tokens, np.arange(2), np.zeros(2, int))
        plain = model(input_ids=batch.inputs_BT, labels=batch.targets_BT).loss
    ours = Objective(model)(batch.inputs_BT, batch.targets_BT)
    assert ours.item() == pytest.approx(plain.item() * batch.targets, rel=1e-6)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_the_sum_does_not_depend_on_how_a_batch_is_cut(family: str) -> None:
    model = Objective(build(architecture(family), seed=0))
    tokens = np.arange(48).reshape(4, 12) * 5 % 27 + 4
    tokens[1, 3:] = 2
    task = CausalTask(2) if family == "decoder" else MaskedTask(RULE, 0, 31, SPECIAL)
    ids, epochs = np.arange(4), np.zeros(4, int)
    whole = task.batch(tokens, ids, epochs)
    parts = [task.batch(tokens[i : i + 1], ids[i : i + 1], epochs[i : i + 1]) for i in range(4)]
    assert whole.targets == sum(part.targets for part in parts)
    together = model(whole.inputs_BT, whole.targets_BT).item()
    assert together == pytest.approx(sum(model(p.inputs_BT, p.targets_BT).item() for p in parts), rel=1e-5)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_a_batch_that_asks_for_nothing_has_no_loss(family: str) -> None:
    inputs = torch.full((1, 12), 5)
    assert Objective(build(architecture(family), seed=0))(inputs, torch.full((1, 12), IGNORED)).item() == 0.0
    assert Batch(inputs, torch.full((1, 12), IGNORED)).targets == 0


@pytest.mark.parametrize("family", ["decoder", "encoder"])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_a_loss_in_chunks_has_the_value_and_the_gradients_of_the_whole(family: str, chunk: int) -> None:
    task = CausalTask(2) if family == "decoder" else MaskedTask(RULE, 0, 31, SPECIAL)
    batch = task.batch(np.arange(48).reshape(4, 12) * 5 % 27 + 4, np.arange(4), np.zeros(4, int))
    found = []
    for limit in (None, chunk):
        objective = Objective(build(architecture(family), seed=0), limit)
        loss = objective(batch.inputs_BT, batch.targets_BT)
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in objective.named_parameters()}))
    (whole, gradients), (parts, chunked) = found
    assert parts == pytest.approx(whole, rel=1e-6)
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(chunked[name], gradient, rtol=0, atol=1e-5 * scale + 1e-7)


def test_a_loss_in_chunks_never_holds_more_logits_than_a_chunk() -> None:
    objective = Objective(build(architecture("decoder"), seed=0), 3)
    heights: list[int] = []
    objective.model.lm_head.register_forward_hook(lambda _module, _inputs, logits: heights.append(len(logits)))
    batch = CausalTask(2).batch(np.arange(24).reshape(2, 12) % 27 + 4, np.arange(2), np.zeros(2, int))
    objective(batch.inputs_BT, batch.targets_BT).backward()
    assert max(heights) == 3
    assert sum(heights) == 2 * batch.targets  # once in the forward pass, once more in the backward pass


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_model_computes_the_same_and_keeps_its_names() -> None:
    plain, compiled = (Objective(build(architecture("decoder"), seed=0)) for _ in range(2))
    compiled.compile_model()
    batch = CausalTask(2).batch(np.arange(24).reshape(2, 12) % 27 + 4, np.arange(2), np.zeros(2, int))
    losses = []
    for objective in (plain, compiled):
        loss = objective(batch.inputs_BT, batch.targets_BT)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, one), (other_name, other) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        assert name == other_name
        torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=1e-4 * float(one.grad.abs().max()) + 1e-6)
