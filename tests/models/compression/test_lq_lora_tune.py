"""Adapters train, and nothing else: the base keeps its bytes, and the loss falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from models.architectures import predict
from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from models.compression import lq_lora, lq_lora_tune
from models.compression.modules.adapted import AdaptedLinear

IDS = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
NAMES = [
    f"model.layers.{n}.{part}" for n in range(2) for part in ("self_attn.q_proj", "mlp.down_proj", "self_attn.o_proj")
]


def model_of() -> Any:
    sizes: dict[str, Any] = {"width": 32, "layers": 2, "heads": 2, "ffn_width": 64, "init_std": 0.1}
    return build(ArchitectureConfig(vocab_size=40, max_positions=16, **sizes, **IDS), seed=3)


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is stored of the bases, and everything else that is frozen."""
    bases = {
        f"{name}.{key}": tensor.clone()
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
        for key, tensor in module.quantized.tensors().items()
    }
    return bases | {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("start", ["lq", "zero"])
def test_training_moves_the_adapters_only_and_lowers_the_loss(start: str) -> None:
    model, config = model_of(), lq_lora_tune.Config.model_validate({"bits": 2, "rank": 4, "init_from": start})
    ids_BT = torch.randint(4, 40, (8, 16), generator=torch.Generator().manual_seed(0))
    lq_lora_tune.Method().transform(model, NAMES, config)
    assert {name.rpartition(".")[2] for name, _ in model.named_parameters()} == {"left_OR", "right_RI"}
    before, losses = stored(model), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(12):
        nats = predict.language_nats(model, ids_BT[:, :-1], ids_BT[:, 1:]) / ids_BT[:, 1:].numel()
        optimizer.zero_grad()
        nats.backward()
        optimizer.step()
        losses.append(float(nats.detach()))
    assert losses[-1] < losses[0] - 0.05
    after = stored(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_was_frozen_comes_back_as_it_was_tied_embeddings_included() -> None:
    original, model = model_of(), model_of()
    config = lq_lora_tune.Config(bits=4)
    lq_lora_tune.Method().transform(model, NAMES, config)
    packed = lq_lora_tune.Method().finish(model, config)
    assert set(packed) == set(NAMES)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    wanted = {n: p for n, p in original.named_parameters() if n.rpartition(".")[0] not in packed}
    found = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] not in packed}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_start_is_that_of_lq_lora_and_computes_what_is_stored() -> None:
    linear = nn.Linear(64, 48, bias=True)
    config = lq_lora_tune.Config(bits=3, rank=4)
    start = lq_lora_tune.begin(linear.weight.detach(), config)
    theirs = lq_lora.decompose(
        linear.weight.detach(), torch.ones(48, 64), lq_lora.Config(bits=3, rank=4, weighting="none")
    )
    assert torch.equal(start.dequantize(), theirs.dequantize())
    layer, x = AdaptedLinear(linear, start), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layer(x), x @ start.dequantize().T + linear.bias, atol=1e-5)
    back = lq_lora_tune.Method().restore(layer.pack().tensors(), config)
    assert torch.equal(back.dequantize(), start.dequantize())


def test_the_zero_start_is_the_rounded_weight_and_costs_as_many_bits() -> None:
    weight_OI = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    zero, split = (
        lq_lora_tune.begin(weight_OI, lq_lora_tune.Config.model_validate({"bits": 2, "init_from": start}))
        for start in ("zero", "lq")
    )
    assert torch.equal(zero.dequantize(), zero.quantized.dequantize())
    assert zero.stored_bits() == split.stored_bits()
    assert (split.dequantize() - weight_OI).norm() < 0.9 * (zero.dequantize() - weight_OI).norm()
    assert float(zero.right_RI.float().std()) > 0.05, "a zero right factor would never train"
