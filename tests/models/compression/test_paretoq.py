"""ParetoQ's quantizers against their formulas, written out one weight at a time."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from models.compression import paretoq
from models.compression.formats.int_grid import IntPacked
from models.compression.formats.level_codes import LevelPacked
from models.compression.modules.quantized import QuantizedLinear
from models.compression.paretoq import Config, Scheme, scheme

CASES = [(1.0, "paretoq"), (1.58, "paretoq"), (2.0, "paretoq"), (2.0, "lsq"), (3.0, "paretoq"), (4.0, "paretoq")]
UNIT_LEVELS = {
    (1.0, "paretoq"): [-1.0, 1.0],
    (1.58, "paretoq"): [-2 / 3, 0.0, 2 / 3],
    (2.0, "paretoq"): [-0.75, -0.25, 0.25, 0.75],
    (2.0, "lsq"): [-2.0, -1.0, 0.0, 1.0],
    (3.0, "paretoq"): [float(code) for code in range(-4, 4)],
    (4.0, "paretoq"): [float(code) for code in range(-8, 8)],
}


def config(bits: float, quantizer: str, **more: str) -> Config:
    return Config.model_validate({"bits": bits, "quantizer": quantizer, **more})


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(3))


def reference_level(ratio: float, bits: float, quantizer: str) -> float:
    """The level at alpha = 1 of a weight at alpha = 1, as the paper states it."""
    if bits == 1:
        return 1.0 if ratio >= 0 else -1.0
    if bits == 1.58:
        return round(min(max(ratio, -0.99), 0.99) * 1.5) / 1.5
    if bits == 2 and quantizer == "paretoq":
        return (round(min(max(ratio, -0.99), 0.99) * 2 - 0.5) + 0.5) / 2
    half = 2 ** (int(bits) - 1)
    return float(min(max(round(ratio), -half), half - 1))


@pytest.mark.parametrize(("bits", "quantizer"), CASES)
def test_a_weight_goes_to_the_level_of_the_formula(bits: float, quantizer: str, weight: Tensor) -> None:
    chosen = scheme(config(bits, quantizer))
    alpha = paretoq.start_scale(weight, chosen)
    quantized = paretoq.quantize(weight, alpha, chosen)
    step = paretoq.stored_step(alpha, chosen).double() * chosen.divisor
    for row in range(len(weight)):
        for w, q in zip(weight[row].tolist(), quantized[row].tolist(), strict=True):
            expected = reference_level(w / float(step[row]), bits, quantizer) * float(step[row])
            assert q == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("bits", "quantizer"), CASES)
def test_the_levels_are_those_of_the_paper_and_no_others(bits: float, quantizer: str) -> None:
    chosen = scheme(config(bits, quantizer))
    spread = torch.linspace(-20, 20, 4001).unsqueeze(0)
    found = paretoq.quantize(spread, torch.ones(1), chosen).unique()
    expected = torch.tensor(UNIT_LEVELS[bits, quantizer])
    assert len(found) == len(expected)
    # The step of the ternary levels, 2/3, is stored in bfloat16.
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=0)


def reference_gradients(
    w: Tensor, alpha: Tensor, gradient: Tensor, bits: float, chosen: Scheme
) -> tuple[Tensor, Tensor]:
    """ParetoQ's backward pass, one weight at a time in float64."""
    low, high = chosen.clip
    top = (chosen.highest + chosen.shift) / chosen.divisor
    share = 1 / math.sqrt(w.numel() * top)
    to_weight, to_alpha = torch.zeros_like(w, dtype=torch.float64), torch.zeros(len(w), dtype=torch.float64)
    for row in range(len(w)):
        for column in range(w.shape[1]):
            ratio, g = float(w[row, column]) / float(alpha[row]), float(gradient[row, column])
            inside = low <= ratio <= high
            level = reference_level(ratio, bits, "lsq" if chosen.divisor == 1 else "paretoq")
            to_weight[row, column] = g if inside else 0.0
            to_alpha[row] += share * g * (level - ratio if inside and bits > 1 else level)
    return to_weight, to_alpha


@pytest.mark.parametrize(("bits", "quantizer"), CASES)
def test_gradients_are_those_of_the_formula(bits: float, quantizer: str, weight: Tensor) -> None:
    """With scales too small for the largest weights, so that both sides of the clip range are met."""
    chosen = scheme(config(bits, quantizer))
    # Powers of two, times the divisor: exactly what a bfloat16 step holds.
    alpha = torch.tensor([0.125, 0.25, 0.5, 1.0, 0.25, 0.125]) * chosen.divisor
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
    one, two = weight.clone().requires_grad_(), alpha.clone().requires_grad_()
    paretoq.quantize(one, two, chosen).backward(gradient)
    to_weight, to_alpha = reference_gradients(weight, alpha, gradient, bits, chosen)
    assert one.grad is not None
    assert two.grad is not None
    assert 0 < float((to_weight == 0).double().mean()) < 1, "some weights must be outside"
    torch.testing.assert_close(one.grad.double(), to_weight, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(two.grad.double(), to_alpha, rtol=1e-4, atol=1e-6)


def test_the_scale_gradient_of_outer_weights_is_the_finite_difference() -> None:
    """Where every weight is clipped the quantizer is linear in the scale, so differences tell the true derivative."""
    chosen = scheme(config(3.0, "paretoq"))
    weight, alpha = torch.tensor([[9.0, -9.0, 7.0, 20.0]]), torch.tensor([1.0])
    gradient = torch.tensor([[0.5, -1.0, 2.0, 0.25]])
    slope = [(paretoq.quantize(weight, alpha + shift, chosen) * gradient).sum() for shift in (0.125, -0.125)]
    expected = float(slope[0] - slope[1]) / 0.25 / math.sqrt(weight.numel() * 3)
    tracked = alpha.clone().requires_grad_()
    (paretoq.quantize(weight, tracked, chosen) * gradient).sum().backward()
    assert tracked.grad is not None
    assert float(tracked.grad) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("bits", "quantizer"), CASES)
def test_the_value_is_the_same_with_and_without_gradients(bits: float, quantizer: str, weight: Tensor) -> None:
    chosen = scheme(config(bits, quantizer))
    alpha = paretoq.start_scale(weight, chosen)
    tracked = paretoq.quantize(weight.clone().requires_grad_(), alpha.clone().requires_grad_(), chosen)
    assert torch.equal(tracked.detach(), paretoq.quantize(weight, alpha, chosen))


def test_scales_start_where_the_paper_starts_them(weight: Tensor) -> None:
    binary = paretoq.start_scale(weight, scheme(config(1.0, "paretoq")))
    torch.testing.assert_close(binary, weight.abs().mean(1), rtol=2**-8, atol=0)
    stretched = paretoq.start_scale(weight, scheme(config(2.0, "paretoq")))
    torch.testing.assert_close(stretched, weight.abs().amax(1), rtol=2**-8, atol=0)
    lsq = paretoq.start_scale(weight, scheme(config(3.0, "paretoq")))
    torch.testing.assert_close(lsq, weight.abs().amax(1) / 3, rtol=2**-8, atol=0)
    assert torch.equal(lsq, lsq.to(torch.bfloat16).float()), "a cast of buffers to bfloat16 must change nothing"


STORED = [*((bits, quantizer, "smallest") for bits, quantizer in CASES), (1.0, "paretoq", "public")]
STORED += [(1.58, "paretoq", "ternary5"), (2.0, "paretoq", "public"), (3.0, "paretoq", "public")]


@pytest.mark.parametrize(("bits", "quantizer", "storage"), STORED)
def test_what_is_stored_is_what_the_layer_computes_with(
    bits: float, quantizer: str, storage: str, weight: Tensor
) -> None:
    chosen = config(bits, quantizer, storage=storage)
    layer = trained_layer(weight, chosen)
    packed = paretoq.pack(layer, chosen)
    inputs = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(inputs), nn.functional.linear(inputs, packed.dequantize()))
    assert torch.equal(paretoq.Method().restore(packed.tensors(), chosen).dequantize(), packed.dequantize())
    public = storage == "public" or quantizer == "lsq" or (bits > 1 and bits != 2 and storage == "smallest")
    assert isinstance(packed, IntPacked if public else LevelPacked)
    assert (packed.scheme() is not None) == public


def trained_layer(weight: Tensor, chosen: Config) -> QuantizedLinear:
    """Return a layer whose scales have moved away from their start."""
    import functools

    linear = nn.Linear(40, 6, bias=False)
    linear.weight = nn.Parameter(weight)
    levels = scheme(chosen)
    layer = QuantizedLinear(
        linear, paretoq.start_scale(weight, levels), functools.partial(paretoq.quantize, levels_=levels)
    )
    with torch.no_grad():
        layer.gain.copy_(torch.linspace(0.7, 1.3, 6))
    return layer.requires_grad_(requires_grad=False)


@pytest.mark.parametrize(
    ("bits", "storage", "expected"),
    [(1.0, "smallest", 1), (1.58, "ternary5", 1.6), (1.58, "smallest", 2), (2.0, "smallest", 2), (2.0, "public", 3)],
)
def test_a_weight_takes_the_bits_that_the_documentation_says(bits: float, storage: str, expected: float) -> None:
    chosen = config(bits, "paretoq", storage=storage)
    wide = torch.randn(4, 1600, generator=torch.Generator().manual_seed(0))
    linear = nn.Linear(1600, 4, bias=False)
    linear.weight = nn.Parameter(wide)
    layer = QuantizedLinear(linear, paretoq.start_scale(wide, scheme(chosen)), lambda w, _: w)
    overhead = 8 * (4 * 2 + 2 * 8)
    assert paretoq.pack(layer, chosen).stored_bits() == round(expected * wide.numel()) + overhead


def test_a_scale_stays_positive_when_its_gain_changes_sign(weight: Tensor) -> None:
    layer = trained_layer(weight, config(2.0, "paretoq"))
    layer.gain.fill_(-0.5)
    assert bool((layer.scale() > 0).all())
    layer.gain.zero_()
    assert bool(torch.isfinite(layer(torch.ones(1, 40))).all())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"bits": 5}, "bits = 5; valid: 1, 1.58, 2, 3, 4"),
        ({"bits": 1, "quantizer": "lsq"}, "LSQ needs 2 bits or more"),
        ({"bits": 2, "storage": "ternary5"}, "holds three levels: bits = 2 must be 1.58"),
        ({"batch_size": 6}, "batch_size = 6 is not a multiple of world_size x micro_batch_size = 2 x 4 = 8"),
        ({"engine": "plain"}, "plain runs in one process without sharding: world_size = 2"),
    ],
)
def test_parameters_that_cannot_work_are_refused(table: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(table)


def test_the_arms_share_the_schedule_and_the_bits() -> None:
    arms = paretoq.Method().baselines(Config(bits=3, steps=77, lr=0.002))
    assert arms["continued fp32"]["steps"] == 77
    assert arms["continued fp32"]["lr"] == 0.002
    assert arms["untrained"]["steps"] == 0
    assert {arms[name]["bits"] for name in ("rtn", "gptq")} == {3}
    assert "rtn" not in paretoq.Method().baselines(Config(bits=1))
