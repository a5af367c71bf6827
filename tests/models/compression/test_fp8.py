"""FP8 on one layer, and the rounding of torch's casts against the formats written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.compression import fp8, int8
from models.compression.base import Statistics

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def magnitudes(mantissa: int, bias: int, last: int) -> Tensor:
    """Return the finite magnitudes of a format in the order of their codes, from the definition (arXiv 2209.05433)."""
    codes = torch.arange(last + 1)
    exponent, fraction = codes >> mantissa, (codes % (1 << mantissa)).double() / (1 << mantissa)
    return torch.exp2((exponent.clamp(min=1) - bias).double()) * (fraction + (exponent > 0).double())


TABLES = {"e4m3": magnitudes(3, 7, 0x7E), "e5m2": magnitudes(2, 15, 0x7B)}


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_every_finite_code_stands_for_what_the_format_says(form: str) -> None:
    table = TABLES[form]
    codes = torch.arange(len(table)).to(torch.uint8)
    assert torch.equal(codes.view(DTYPES[form]).double(), table)
    assert torch.equal((codes + 0x80).view(DTYPES[form]).double(), -table)
    assert torch.finfo(DTYPES[form]).max == table[-1]


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_rounding_is_to_the_nearest_ties_to_even_and_stays_at_the_largest(form: str) -> None:
    """Every midpoint, both its neighbours in float32, and numbers of all sizes, one by one against the table."""
    table, generator = TABLES[form], torch.Generator().manual_seed(0)
    middle = ((table[1:] + table[:-1]) / 2).float()
    near = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (0.0, float("inf"))]
    powers = torch.exp2(torch.randint(-18, 18, (2000,), generator=generator).float())
    largest = float(table[-1])
    beyond = largest * torch.tensor([1.0, 1.03, 1.0715, 1.08, 1.2, 1e9, float("inf")])
    values = torch.cat([middle, *near, torch.randn(2000, generator=generator) * powers, beyond, torch.zeros(1)])
    values = torch.cat([values, -values])
    apart = (values.double().abs().clamp(max=largest).unsqueeze(1) - table).abs()
    nearest = apart == apart.min(1, keepdim=True).values
    even = torch.arange(len(table)) % 2 == 0
    place = (nearest.long() * 2 + (nearest & even).long()).argmax(1)
    result = fp8.rounded(values, DTYPES[form])
    assert torch.equal(result.view(torch.uint8) & 0x7F, place.to(torch.uint8))
    assert torch.equal(result.float().signbit(), values.signbit())
    assert bool(fp8.rounded(torch.tensor([float("nan")]), DTYPES[form]).isnan())


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Statistics]:
    """A weight [24, 64], and inputs of which four channels are 60 times as large."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 64, generator=generator)
    rows[:, 5:9] *= 60
    weight = torch.randn(24, 64, generator=generator)
    weight[:, 5:9] /= 60
    return weight, Statistics(rows.double().T @ rows.double(), len(rows), inputs_NI=rows)


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_weights_and_inputs_are_cast_as_torch_casts_them(form: str, layer: tuple[Tensor, Statistics]) -> None:
    weight, seen = layer
    packed = fp8.Method().compress(weight, seen, fp8.Config.model_validate({"form": form}))
    stored = packed.tensors()
    scale, input_scale = stored["weight_scale"].float(), stored["input_scale"]
    assert stored["weight"].dtype == DTYPES[form]
    assert torch.equal(packed.dequantize(), (weight / scale).to(DTYPES[form]).float() * scale)
    rows = seen.rows("fp8", 64)
    assert torch.equal(packed.inputs(rows), (rows / input_scale).to(DTYPES[form]).float() * input_scale)


@pytest.mark.parametrize(("form", "largest"), [("e4m3", 448), ("e5m2", 57344)])
def test_the_largest_value_lands_near_the_largest_of_the_format(
    form: str, largest: int, layer: tuple[Tensor, Statistics]
) -> None:
    weight, seen = layer
    stored = fp8.Method().compress(weight, seen, fp8.Config.model_validate({"form": form})).tensors()
    tops = stored["weight"].float().abs().amax(1)
    assert bool((tops >= 0.85 * largest).all()), "every channel has its own scale"
    assert bool((tops <= largest).all())
    spare = fp8.Method().compress(weight, seen, fp8.Config.model_validate({"form": form, "margin": 2})).tensors()
    assert torch.equal(spare["input_scale"], stored["input_scale"] * 4)


def test_channels_of_very_different_size_suit_floating_point_better_than_integers(
    layer: tuple[Tensor, Statistics],
) -> None:
    weight, seen = layer
    rows = seen.rows("fp8", 64)
    exact = rows @ weight.T
    errors = [
        float((packed.forward(rows) - exact).square().mean())
        for packed in (
            fp8.Method().compress(weight, seen, fp8.Config()),
            int8.Method().compress(weight, seen, int8.Config(calibrator="max")),
        )
    ]
    assert errors[0] < 0.5 * errors[1]


def test_a_channel_of_small_weights_is_rounded_as_well_as_one_of_large_ones(layer: tuple[Tensor, Statistics]) -> None:
    """One scale a tensor takes channels below 2^-9 of the largest to nothing."""
    weight, seen = layer
    sizes = torch.logspace(0, -6, 24).unsqueeze(1)
    made = fp8.Method().compress(weight * sizes, seen, fp8.Config()).dequantize()
    errors = ((made - weight * sizes) / sizes).square().sum(1) / weight.square().sum(1)
    assert float(errors.max()) < 2e-3


def test_the_scale_of_inputs_is_that_of_all_tokens_not_of_the_sample(layer: tuple[Tensor, Statistics]) -> None:
    weight, seen = layer
    more = replace(seen, highest_I=seen.rows("fp8", 64).abs().amax(0) * 8)
    for method, config in ((fp8.Method(), fp8.Config()), (int8.Method(), int8.Config(calibrator="max"))):
        sample, everything = (method.compress(weight, s, config).tensors()["input_scale"] for s in (seen, more))
        assert float(everything) == pytest.approx(8 * float(sample), rel=0.02)


def test_only_e4m3_has_a_public_layout(layer: tuple[Tensor, Statistics]) -> None:
    weight, seen = layer
    public, private = (
        fp8.Method().compress(weight, seen, fp8.Config.model_validate({"form": form})) for form in DTYPES
    )
    assert public.scheme() == public.input_scheme() | {"strategy": "channel"}  # type: ignore[operator]
    assert private.scheme() is None
