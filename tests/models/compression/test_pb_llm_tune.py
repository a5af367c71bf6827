"""PB-LLM's training: values and gradients one weight at a time, frozen codes, and a loss that falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.architectures import predict
from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from models.compression import pb_llm, pb_llm_tune
from models.compression.base import Statistics
from models.compression.modules.partly_binary import PartlyBinaryLinear
from models.compression.pb_llm_tune import Config

IDS = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
NAMES = [f"model.layers.{n}.{part}" for n in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]


def model_of() -> Any:
    sizes: dict[str, Any] = {"width": 32, "layers": 2, "heads": 2, "ffn_width": 64, "init_std": 0.1}
    return build(ArchitectureConfig(vocab_size=40, max_positions=16, **sizes, **IDS), seed=3)


def frozen(start: pb_llm.MixedPacked) -> tuple[Tensor, Tensor]:
    return start.salient_OI, torch.where(start.salient_OI, start.dequantize(), 0.0)


def bfloat(value: float) -> float:
    return float(torch.tensor(value).to(torch.bfloat16))


def reference(weight: Tensor, salient: Tensor, kept: Tensor, size: int) -> Tensor:
    """One row and group at a time, as the formula says."""
    quantized = kept.clone()
    for row in range(len(weight)):
        for first in range(0, weight.shape[1], size):
            free = [c for c in range(first, first + size) if not salient[row, c]]
            values = [float(weight[row, c]) for c in free]
            mean = bfloat(sum(values) / len(values))
            amplitude = bfloat(sum(abs(v - mean) for v in values) / len(values))
            for column, value in zip(free, values, strict=True):
                quantized[row, column] = mean + amplitude * (1 if value >= mean else -1)
    return quantized


@pytest.mark.parametrize(("salient", "group_size"), [(0.1, 0), (0.3, 16), (0.0, 0)])
def test_weights_become_frozen_codes_and_two_values_a_row(salient: float, group_size: int) -> None:
    """Also after the trained weights have moved away from their start."""
    generator = torch.Generator().manual_seed(0)
    weight, config = torch.randn(6, 48, generator=generator), Config(salient=salient, group_size=group_size)
    mask, kept = frozen(pb_llm_tune.begin(weight, config))
    assert float(mask.double().mean()) == pytest.approx(salient, abs=0.01)
    moved = weight + 0.5 * torch.randn(6, 48, generator=generator)
    for now in (weight, moved):
        found = pb_llm_tune.quantize(now, mask, kept, config)
        torch.testing.assert_close(found, reference(now, mask, kept, group_size or 48), atol=1e-6, rtol=2**-7)
    assert bool((kept[mask] - weight[mask]).abs().le(0.51 * 1.5 / 127 * weight.abs().amax()).all())


def test_the_gradient_passes_the_signs_and_stops_at_the_frozen() -> None:
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    config = Config(salient=0.25)
    mask, kept = frozen(pb_llm_tune.begin(weight.detach(), config))
    gradient = torch.randn(6, 48, generator=torch.Generator().manual_seed(2))
    pb_llm_tune.quantize(weight, mask, kept, config).backward(gradient)
    assert weight.grad is not None
    assert torch.equal(weight.grad, gradient * ~mask)


def test_the_start_is_pb_llm_without_compensation() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    config = Config(salient=0.2)
    alone = pb_llm.Method().baselines(weight, Statistics(torch.eye(64), 1), config.stored)["rtn"]
    mine = pb_llm_tune.begin(weight, config)
    assert torch.equal(mine.dequantize(), alone.dequantize())
    assert mine.stored_bits() == alone.stored_bits()


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_training_lowers_the_loss_and_keeps_every_frozen_code(decay: float) -> None:
    """Also where an optimizer's weight decay moves the parameters behind them."""
    model, config = model_of(), Config(salient=0.2)
    pb_llm_tune.Method().transform(model, NAMES, config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PartlyBinaryLinear)}
    assert set(layers) == set(NAMES)
    ids_BT = torch.randint(4, 40, (8, 16), generator=torch.Generator().manual_seed(0))
    before, losses = pb_llm_tune.Method().finish(model, config), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=decay)
    for _ in range(12):
        nats = predict.language_nats(model, ids_BT[:, :-1], ids_BT[:, 1:]) / ids_BT[:, 1:].numel()
        optimizer.zero_grad()
        nats.backward()
        optimizer.step()
        losses.append(float(nats.detach()))
    assert losses[-1] < losses[0] - 0.05
    after = pb_llm_tune.Method().finish(model, config)
    for name in NAMES:
        one, two = before[name].tensors(), after[name].tensors()
        same = {key for key in one if torch.equal(one[key], two[key])}
        assert same == {"weight_bitmask", "weight_codes", "weight_scale", "weight_shape"}


def test_what_is_stored_computes_what_was_trained() -> None:
    linear, config = nn.Linear(64, 48), Config(salient=0.1, group_size=16)
    start = pb_llm_tune.begin(linear.weight.detach(), config)
    owner = nn.ModuleDict({"a": linear})
    pb_llm_tune.Method().transform(owner, ["a"], config)
    layer = owner["a"]
    assert isinstance(layer, PartlyBinaryLinear)
    layer.weight.data += 0.1 * torch.randn(48, 64, generator=torch.Generator().manual_seed(4))
    packed = pb_llm_tune.Method().finish(owner, config)["a"]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(5))
    again = pb_llm_tune.Method().restore(packed.tensors(), config)
    assert torch.equal(layer(x), nn.functional.linear(x, again.dequantize(), linear.bias))
    assert not torch.equal(again.dequantize(), start.dequantize())
    assert packed.stored_bits() == start.stored_bits()


def test_arms_at_equal_bytes_and_an_all_binary_one() -> None:
    arms = pb_llm_tune.Method().baselines(Config(salient=0.3, group_size=32, steps=7))
    assert set(arms) == {"untrained", "pb_llm", "continued fp32", "all binary"}
    assert arms["pb_llm"] == {"method": "pb_llm", "salient": 0.3, "group_size": 32}
    assert (arms["all binary"]["salient"], arms["all binary"]["steps"]) == (0.0, 7)
    assert "all binary" not in pb_llm_tune.Method().baselines(Config(salient=0.0))
    assert Config(salient=0.3, group_size=32).label == "30-g32"
