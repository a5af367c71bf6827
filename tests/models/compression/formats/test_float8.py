"""The FP8 codecs, exhaustively, against torch's own casts and the tables of the paper."""

from __future__ import annotations

import pytest
import torch

from models.compression.formats import float8

FORMATS = [(float8.E4M3, torch.float8_e4m3fn), (float8.E5M2, torch.float8_e5m2)]
CODES = torch.arange(256, dtype=torch.int64).to(torch.uint8)
both = pytest.mark.parametrize(("form", "dtype"), FORMATS, ids=["e4m3", "e5m2"])


@both
def test_all_256_codes_decode_as_torch_does(form: float8.Format, dtype: torch.dtype) -> None:
    theirs = CODES.view(dtype).float()
    mine = float8.decode(CODES, form)
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert torch.equal(mine.nan_to_num(0).view(torch.int32), theirs.nan_to_num(0).view(torch.int32)), "signed zeros too"


@both
def test_every_code_but_nan_survives_the_round_trip(form: float8.Format, dtype: torch.dtype) -> None:
    values = float8.decode(CODES, form)
    again = float8.encode(values, form, saturate=False)
    known = ~values.isnan()
    assert torch.equal(again[known], CODES[known])
    assert bool(float8.decode(again[~known], form).isnan().all())


@both
def test_ties_neighbours_and_random_numbers_are_rounded_bit_for_bit_as_torch_does(
    form: float8.Format, dtype: torch.dtype
) -> None:
    sizes = float8.magnitudes(form)
    middle = ((sizes[1:] + sizes[:-1]) / 2).float()
    near = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (0.0, float("inf"))]
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20_000, generator=generator) * torch.exp2(
        torch.randint(-18, 18, (20_000,), generator=generator).float()
    )
    beyond = form.largest * torch.tensor([1.0, 1.03, 1.0715, 1.08, 1.2, 3.0, float("inf"), float("nan")])
    edges = torch.tensor(
        [0.0, 448, 464, 464.01, 57344, 61440, 2.0**-6, 2.0**-9, 2.0**-10, 2.0**-14, 2.0**-16, 2.0**-17]
    )
    values = torch.cat([middle, *near, spread, edges, beyond])
    values = torch.cat([values, -values])
    if form is float8.E4M3:  # what torch makes of what lies beyond differs between its releases
        values = values[~(values.abs() > 464)]
    mine, theirs = float8.encode(values, form, saturate=False), values.to(dtype)
    nan = theirs.float().isnan()
    assert torch.equal(mine[~nan], theirs.view(torch.uint8)[~nan])
    assert bool(float8.decode(mine[nan], form).isnan().all())


@pytest.mark.parametrize(
    ("form", "largest", "normal", "subnormal"),
    [(float8.E4M3, 448.0, 2.0**-6, 2.0**-9), (float8.E5M2, 57344.0, 2.0**-14, 2.0**-16)],
    ids=["e4m3", "e5m2"],
)
def test_the_tables_of_the_paper_hold(form: float8.Format, largest: float, normal: float, subnormal: float) -> None:
    assert form.largest == largest
    values = float8.decode(CODES, form)
    positive = values[(values > 0) & values.isfinite()].sort().values
    assert positive[0] == subnormal
    assert float8.decode(torch.tensor([1 << form.mantissa], dtype=torch.uint8), form) == normal
    assert int(values.isnan().sum()) == (2 if form is float8.E4M3 else 6)
    assert int(values.isinf().sum()) == (0 if form is float8.E4M3 else 2)


def test_without_saturation_too_large_is_infinite_or_nan() -> None:
    values = torch.tensor([464.0, 464.1, -1e9, float("inf")])
    four = float8.decode(float8.encode(values, float8.E4M3, saturate=False), float8.E4M3)
    assert four[0] == 448, "a tie goes to the even code"
    assert bool(four[1:].isnan().all())
    five = float8.decode(float8.encode(values * 128, float8.E5M2, saturate=False), float8.E5M2)
    assert five.tolist()[0] == 57344
    assert five.tolist()[2:] == [-float("inf"), float("inf")]


@both
def test_saturation_keeps_what_is_too_large_at_the_largest(form: float8.Format, dtype: torch.dtype) -> None:
    values = torch.tensor([1e9, -1e9, float("inf"), -float("inf"), form.largest * 1.0001])
    top = form.largest
    assert float8.decode(float8.encode(values, form), form).tolist() == [top, -top, top, -top, top]
    assert bool(float8.decode(float8.encode(torch.tensor([float("nan")]), form), form).isnan())
