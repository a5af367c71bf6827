"""BitNet's two roundings against their formulas, and the gradients that pass them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from models.architectures.config import Shape
from models.compression import bitnet, finetune
from models.compression.bitnet import Config


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(8, 30, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_weights_go_to_three_levels_around_the_scale_of_the_matrix(rule: str, weight: Tensor) -> None:
    quantized = bitnet.quantize_weight(weight, rule)
    sizes = sorted(abs(value) for value in weight.flatten().tolist())
    scale = sum(sizes) / len(sizes) if rule == "mean" else sizes[(len(sizes) - 1) // 2]
    expected = [min(max(round(value / scale), -1), 1) * scale for value in weight.flatten().tolist()]
    assert quantized.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert len(quantized.unique()) == 3


def test_inputs_go_to_the_nearest_of_255_levels_of_their_token() -> None:
    x = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)) * torch.tensor([[[1.0], [100.0], [1e-3]]])
    quantized = bitnet.quantize_input(x)
    for token, result in zip(x.flatten(0, 1), quantized.flatten(0, 1), strict=True):
        step = float(token.abs().max()) / 127
        assert float((token - result).abs().max()) <= step / 2 * 1.001
        codes = result / step
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        assert float(result.abs().max()) == pytest.approx(float(token.abs().max()), rel=1e-6)


def test_a_token_of_zeros_stays_zero() -> None:
    assert torch.equal(bitnet.quantize_input(torch.zeros(2, 5)), torch.zeros(2, 5))


def test_both_roundings_let_gradients_pass_unchanged(weight: Tensor) -> None:
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    for function in (lambda t: bitnet.quantize_weight(t, "mean"), bitnet.quantize_input):
        tracked = weight.clone().requires_grad_()
        function(tracked).backward(gradient)
        assert torch.equal(tracked.grad, gradient)


def test_normalised_inputs_have_unit_mean_square() -> None:
    x = 7 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    normal = bitnet.prepared_input(x, Config(norm=True, activation_bits=0))
    torch.testing.assert_close(normal.square().mean(-1), torch.ones(4))
    assert torch.equal(bitnet.prepared_input(x, Config(activation_bits=0)), x)


@pytest.mark.parametrize("norm", [False, True])
def test_the_stored_layer_computes_what_the_trained_one_does(norm: bool, weight: Tensor) -> None:
    config = Config(norm=norm)
    model = nn.Sequential(nn.Linear(30, 8))
    model[0].weight = nn.Parameter(weight)
    bitnet.Method().transform(model, ["0"], config)
    packed = bitnet.Method().finish(model, config)["0"]
    x = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    restored = bitnet.Method().restore(packed.tensors(), config)
    with torch.no_grad():
        expected = model(x)
    bias = model[0].bias.detach()
    assert torch.equal(nn.functional.linear(restored.inputs(x), restored.dequantize(), bias), expected)  # type: ignore[attr-defined]
    assert all(len(row.unique()) <= 3 for row in restored.dequantize())


def test_a_weight_takes_a_fifth_of_a_byte() -> None:
    packed = bitnet.pack(torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)), Config())
    assert packed.stored_bits() == 8 * (4 * 200 + 4 + 2 * 8)


def test_a_wider_model_keeps_the_size_of_its_heads() -> None:
    parent = Shape(width=64, heads=4, kv_heads=2, ffn_width=96, layers=3)
    wide = bitnet.Method().shape(parent, Config(init_from="scratch", widen=2))
    assert (wide.width, wide.heads, wide.kv_heads, wide.ffn_width, wide.layers) == (128, 8, 4, 192, 3)
    assert wide.head_size == parent.head_size
    assert bitnet.Method().shape(parent, Config()) == parent


def test_the_weights_of_a_parent_do_not_fit_a_wider_model() -> None:
    with pytest.raises(ValidationError, match="widen = 2: the base's weights do not fit; valid: 1, or init_from = scr"):
        Config(widen=2)


def test_the_control_starts_where_the_method_starts() -> None:
    arms = bitnet.Method().baselines(Config(init_from="scratch", steps=9))
    assert arms["fp32"]["init_from"] == "scratch"
    assert arms["fp32"]["steps"] == 9
    assert set(bitnet.Method().baselines(Config())) == {"fp32", "untrained"}


def test_a_wider_model_is_compared_with_full_precision_of_both_widths() -> None:
    """That twice the width beats full precision says nothing while full precision has half of it."""
    arms = bitnet.Method().baselines(Config(init_from="scratch", widen=2))
    base = Shape(width=64, heads=4, kv_heads=2, ffn_width=96, layers=3)
    widths = {
        name: finetune.Method().shape(base, finetune.Config.model_validate(_own(table))).width
        for name, table in arms.items()
    }
    assert widths == {"fp32": 64, "fp32, as wide": 128}


def _own(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != "method"}


def test_full_precision_of_another_width_cannot_start_from_the_base() -> None:
    with pytest.raises(ValidationError, match="widen = 2: the base's weights do not fit"):
        finetune.Config(widen=2)
