"""Training at 8 bits: values one weight and one token at a time, gradients, and what is stored."""

from __future__ import annotations

import torch
from torch import nn

from models.compression import int8_tune
from models.compression.formats.quantized_input import InputPacked
from models.compression.int8_tune import Config


def test_a_weight_becomes_its_nearest_code_of_the_row() -> None:
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    found = int8_tune.quantize_weight(weight)
    for row in range(5):
        scale = float(weight[row].abs().max()) / 127
        stored = float(int8_tune.pack(weight).tensors()["weight_scale"][row])
        assert scale <= stored <= 1.02 * scale, "as bfloat16, and never smaller"
        for column in range(24):
            code = round(float(weight[row, column]) / stored)
            assert abs(code) <= 127
            assert float(found[row, column]) == torch.tensor(code * stored).float().item()


def test_an_input_is_rounded_on_the_scale_of_its_token() -> None:
    x = (
        torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
        * torch.tensor([1.0, 50.0, 0.0])[None, :, None]
    )
    found = int8_tune.quantize_input(x)
    for batch in range(2):
        for token in range(3):
            scale = float(x[batch, token].abs().max()) / 127.5
            error = (found[batch, token] - x[batch, token]).abs().max()
            assert float(error) <= 0.5001 * scale, "the largest may be half a step above the highest code"


def test_gradients_are_those_of_the_layer_that_rounds_nothing_at_the_rounded_point() -> None:
    linear, generator = nn.Linear(16, 8), torch.Generator().manual_seed(2)
    x = torch.randn(4, 16, generator=generator).requires_grad_()
    owner = nn.ModuleDict({"a": linear})
    int8_tune.Method().transform(owner, ["a"], Config())
    slope = torch.randn(4, 8, generator=generator)
    owner["a"](x).backward(slope)
    rounded_x, rounded_weight = int8_tune.quantize_input(x).detach(), int8_tune.quantize_weight(linear.weight).detach()
    torch.testing.assert_close(x.grad, slope @ rounded_weight)
    torch.testing.assert_close(owner["a"].weight.grad, slope.T @ rounded_x)
    torch.testing.assert_close(owner["a"].bias.grad, slope.sum(0))


def test_what_is_stored_computes_what_was_trained() -> None:
    linear = nn.Linear(64, 48)
    owner = nn.ModuleDict({"a": linear})
    int8_tune.Method().transform(owner, ["a"], Config())
    layer = owner["a"]
    layer.weight.data += 0.1 * torch.randn(48, 64, generator=torch.Generator().manual_seed(4))
    packed = int8_tune.Method().finish(owner, Config())["a"]
    again = int8_tune.Method().restore(packed.tensors(), Config())
    assert isinstance(again, InputPacked)
    assert again.input_scheme()["dynamic"]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(5))
    assert torch.equal(layer(x), again.product(x, again.dequantize(), linear.bias))
    assert packed.stored_bits() == 48 * (64 * 8 + 16)


def test_baselines_are_at_equal_steps_or_without_any() -> None:
    found = int8_tune.Method().baselines(Config(steps=7))
    assert set(found) == {"untrained", "int8", "continued fp32"}
    assert (found["untrained"]["steps"], found["continued fp32"]["steps"]) == (0, 7)
