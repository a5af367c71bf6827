"""Losses and states of both families, against what plain transformers says of the same model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.architectures.build import build
from models.architectures.config import IGNORED, ArchitectureConfig
from models.architectures.predict import final_norm, language_nats, layer_outputs, logits, stack, summed_nats

FAMILIES = ["decoder", "encoder"]
VOCABULARY, BATCH, LENGTH = 53, 3, 11


def model_of(family: str) -> Any:
    shape = {"width": 16, "layers": 3, "heads": 2, "ffn_width": 24, "init_std": 0.2}
    ids = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    return build(
        ArchitectureConfig.model_validate(
            {"family": family, "vocab_size": VOCABULARY, "max_positions": LENGTH, **shape, **ids}
        ),
        seed=4,
    ).eval()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Tokens, and targets of which about half ask for nothing."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(4, VOCABULARY, (BATCH, LENGTH), generator=generator)
    targets = torch.randint(4, VOCABULARY, (BATCH, LENGTH), generator=generator)
    targets[torch.rand(BATCH, LENGTH, generator=generator) < 0.5] = IGNORED
    return inputs, targets


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_all_logits_by_transformers(family: str, batch: tuple[Tensor, Tensor]) -> None:
    model, (inputs, targets) = model_of(family), batch
    whole = model(input_ids=inputs).logits.detach().double().log_softmax(-1)
    asked = [(b, t) for b in range(BATCH) for t in range(LENGTH) if targets[b, t] != IGNORED]
    expected = -sum(float(whole[b, t, targets[b, t]]) for b, t in asked)
    assert language_nats(model, inputs, targets).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_chunks_change_neither_loss_nor_gradients(family: str, chunk: int, batch: tuple[Tensor, Tensor]) -> None:
    whole = model_of(family)
    cut = copy.deepcopy(whole)
    losses = []
    for model, size in ((whole, None), (cut, chunk)):
        loss = language_nats(model, *batch, size)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for (name, one), (_, other) in zip(whole.named_parameters(), cut.named_parameters(), strict=True):
        assert one.grad is not None
        # Another order of summation rounds by an ulp of the largest term, also where the terms cancel.
        largest = max(1.0, float(one.grad.abs().max()))
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_chunks_hold_fewer_logits_at_a_time(batch: tuple[Tensor, Tensor]) -> None:
    """What autograd keeps for the backward pass, in bytes: with chunks no logits are among it."""

    def kept(chunk: int | None) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel() if tensor.shape[-1:] == (VOCABULARY,) else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            language_nats(model, *batch, chunk)
        return max(sizes.values())

    model = model_of("decoder")
    assert kept(None) >= VOCABULARY * int((batch[1] != IGNORED).sum())
    assert kept(4) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_a_target_costs_nothing_and_moves_nothing(family: str, batch: tuple[Tensor, Tensor]) -> None:
    model = model_of(family)
    loss = language_nats(model, batch[0], torch.full_like(batch[1], IGNORED))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_outputs_are_the_hidden_states_of_transformers(family: str, batch: tuple[Tensor, Tensor]) -> None:
    model, inputs = model_of(family), batch[0]
    found, last = layer_outputs(model, inputs)
    assert not any(layer._forward_hooks for layer in stack(model))
    known = model(input_ids=inputs, output_hidden_states=True).hidden_states
    assert len(found) == len(stack(model)) == 3
    for one, other in zip(found[:-1], known[1:-1], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(final_norm(model)(found[-1]), last)
    assert torch.equal(logits(model, last), model(input_ids=inputs).logits)


def test_hooks_are_taken_away_when_a_layer_fails(batch: tuple[Tensor, Tensor]) -> None:
    class Failing(nn.Module):
        def forward(self, *_: Any, **__: Any) -> Tensor:
            raise RuntimeError("broken layer")

    model = model_of("decoder")
    model.model.layers[1] = Failing()
    with pytest.raises(RuntimeError, match="broken layer"):
        layer_outputs(model, batch[0])
    assert not any(layer._forward_hooks for layer in stack(model))


def test_half_precision_logits_are_summed_in_float32() -> None:
    """4,096 equal losses of log 2: bfloat16 would stop adding at 256 times one of them."""
    halves = torch.zeros(4096, 2, dtype=torch.bfloat16)
    targets = torch.zeros(4096, dtype=torch.long)
    assert float(summed_nats(halves, targets)) == pytest.approx(4096 * float(torch.tensor(2.0).log()), rel=1e-5)
    naive = functional.cross_entropy(halves, targets, reduction="none").cumsum(0)[-1]
    assert naive.dtype == torch.bfloat16
