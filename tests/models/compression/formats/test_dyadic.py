"""Dyadic factors against their bound, integer requantization against exact fractions."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
import torch

from models.compression.formats.dyadic import dyadic, requantize

RANDOM = torch.Generator().manual_seed(0)
SCALES = torch.cat(
    [
        torch.exp(torch.empty(20_000, dtype=torch.float64).uniform_(-35, 0, generator=RANDOM)),
        2.0 ** -torch.arange(40, dtype=torch.float64),
        1 - 2.0 ** -torch.arange(1, 53, dtype=torch.float64),
    ]
)


def away(value: Fraction) -> int:
    """Round to the nearest whole number, halves away from zero."""
    size = floor(abs(value) + Fraction(1, 2))
    return size if value >= 0 else -size


@pytest.mark.parametrize("bits", [2, 8, 16, 31])
def test_the_relative_error_is_at_most_two_to_the_minus_bits(bits: int) -> None:
    scales = SCALES[torch.lt(SCALES, 2.0 ** (bits - 1))]
    factor, shift = dyadic(scales, bits)
    assert int(factor.min()) >= 2 ** (bits - 1)
    assert int(factor.max()) < 2**bits
    rows = zip(scales[::17].tolist(), factor[::17].tolist(), shift[::17].tolist(), strict=True)
    errors = [abs(Fraction(b) / Fraction(2) ** c / Fraction(s) - 1) for s, b, c in rows]
    assert max(errors) <= Fraction(1, 2**bits)
    assert bits > 16 or max(errors) > Fraction(1, 2 ** (bits + 1)), "the bound is nearly met, so it is the right one"


def test_powers_of_two_are_exact() -> None:
    factor, shift = dyadic(torch.tensor([1.0, 0.5, 2.0**-20, 3 * 2.0**-7]), 8)
    assert factor.tolist() == [128, 128, 128, 192]
    assert shift.tolist() == [7, 8, 27, 13]


def test_products_are_rounded_as_exact_fractions_are() -> None:
    """Over the whole range of the sums and all shifts, from none to more than a product has bits."""
    sums = torch.randint(-(2**31), 2**31, (300,), generator=RANDOM)
    sums = torch.cat([sums, torch.tensor([-(2**31), 2**31 - 1, 0, 1, -1])]).to(torch.int32)
    for bits, top in ((4, 2**4 - 1), (31, 2**31 - 1)):
        for shift in (0, 1, 2, 17, bits, 31, 47, 61, 62, 63, 64, 90):
            found = requantize(sums, torch.tensor(top), torch.tensor(shift)).tolist()
            assert found == [away(Fraction(q * top, 2**shift)) for q in sums.tolist()], (bits, shift)


def test_halves_go_away_from_zero() -> None:
    sums = torch.tensor([1, -1, 3, -3, 5, -5, 2, -2], dtype=torch.int32)
    factor, shift = dyadic(torch.tensor(0.5))
    assert requantize(sums, factor, shift).tolist() == [1, -1, 2, -2, 3, -3, 1, -1]


@pytest.mark.parametrize("bits", [16, 31])
def test_a_million_sums_are_those_of_float64_but_for_ties(bits: int) -> None:
    """At most one step off, and none where the real product is farther from a tie than b / 2^c is from the factor."""
    sums = torch.randint(-(2**24), 2**24, (1_000_000,), generator=RANDOM).to(torch.int32)
    scales = torch.exp(torch.empty(1_000_000, dtype=torch.float64).uniform_(-18, -10, generator=RANDOM))
    found = requantize(sums, *dyadic(scales, bits))
    real = sums.double() * scales
    wanted = (real.abs() + 0.5).floor() * real.sign()
    assert int((found - wanted).abs().max()) <= 1
    distance = (real.abs() % 1 - 0.5).abs()
    clear = distance > real.abs() * (2.0**-bits + 2.0**-50)
    assert float(clear.double().mean()) > 0.98
    assert torch.equal(found[clear], wanted[clear].long())


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 2.0**30])
def test_factors_without_such_a_form_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"valid: 0 < scale < 2\^30"):
        dyadic(torch.tensor([0.5, scale]))


@pytest.mark.parametrize("bits", [1, 32])
def test_registers_of_other_sizes_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits = {bits}; valid: 2 to 31"):
        dyadic(torch.tensor(0.5), bits)
