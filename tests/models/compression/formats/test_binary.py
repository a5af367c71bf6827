"""Binary approximations against the least squares they solve."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.compression.formats import binary


def weights(seed: int = 0) -> torch.Tensor:
    """Return weights [6, 40] off centre."""
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)) + 0.3


def members(seed: int = 1) -> torch.Tensor:
    """Return a mask [6, 40] of about seven in ten."""
    return torch.rand(6, 40, generator=torch.Generator().manual_seed(seed)) < 0.7


def test_means_count_the_members_only() -> None:
    weight, mask = weights(), members()
    found = binary.masked_mean(weight, mask)
    for row in range(6):
        inside = [float(weight[row, i]) for i in range(40) if mask[row, i]]
        assert float(found[row]) == pytest.approx(sum(inside) / len(inside), rel=1e-5)


def test_a_row_without_members_is_zero() -> None:
    empty = torch.zeros(6, 40, dtype=torch.bool)
    found = binary.fit(weights(), empty)
    assert torch.equal(found.mean_O, torch.zeros(6))
    assert torch.equal(found.dense(), torch.zeros(6, 40))


def test_no_other_amplitude_is_closer() -> None:
    weight, mask = weights(), members()
    found = binary.fit(weight, mask)
    error = ((found.dense() - weight).square() * mask).sum(1)
    for step in range(-40, 41):
        other = found._replace(amplitude_O=found.amplitude_O * (1 + step / 100))
        assert bool((((other.dense() - weight).square() * mask).sum(1) >= error * (1 - 1e-4)).all())


def test_no_other_signs_are_closer() -> None:
    weight, mask = weights(), members()
    found = binary.fit(weight, mask)
    error = (found.dense() - weight).abs()
    flipped = (found._replace(sign_OS=~found.sign_OS).dense() - weight).abs()
    assert bool((error <= flipped).all())


def test_dividing_by_the_whole_row_makes_the_amplitude_too_small() -> None:
    """What the released PB-LLM does with weights that are not members: they count as zeros."""
    weight, mask = weights(), members()
    right = binary.fit(weight, mask).amplitude_O
    released = ((weight - (weight * mask).mean(1, keepdim=True)) * mask).abs().mean(1)
    assert bool((released < 0.85 * right).all())


def test_numbers_are_stored_as_they_are_used() -> None:
    found = binary.fit(weights(), members())
    for values in (found.mean_O, found.amplitude_O):
        assert torch.equal(values.bfloat16().float(), values)


@given(count=st.integers(1, 70), seed=st.integers(0, 50))
def test_bits_survive_packing(count: int, seed: int) -> None:
    bits = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = binary.pack_flat(bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-count // 8)
    assert torch.equal(binary.unpack_flat(packed, count), bits)
