"""Digits in bytes, and the levels that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.compression.formats.level_codes import PER_BYTE, LevelPacked, pack_digits, unpack_digits


@given(st.sampled_from([2, 3, 4]), st.integers(1, 5), st.integers(1, 23), st.integers(0, 99))
def test_packed_digits_come_back_and_take_the_bytes_they_must(base: int, rows: int, columns: int, seed: int) -> None:
    digits = torch.randint(0, base, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_digits(digits, base)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-columns // PER_BYTE[base]))
    assert torch.equal(unpack_digits(packed, base, columns), digits)


def test_the_lowest_digit_comes_first() -> None:
    assert pack_digits(torch.tensor([[1, 0, 2]]), 3).tolist() == [[1 + 2 * 9]]
    assert pack_digits(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1, 1]]), 2).tolist() == [[129, 1]]


@pytest.mark.parametrize(("levels", "expected"), [(2, [-1.0, 1.0]), (3, [-2.0, 0.0, 2.0]), (4, [-3.0, -1.0, 1.0, 3.0])])
def test_levels_lie_evenly_around_zero(levels: int, expected: list[float]) -> None:
    digits = torch.arange(levels, dtype=torch.uint8).unsqueeze(0)
    packed = LevelPacked(digits, torch.tensor([2.0], dtype=torch.bfloat16), levels)
    assert packed.dequantize().tolist() == [expected]


def test_each_row_has_its_own_step_or_all_share_one() -> None:
    digits = torch.tensor([[0, 2], [2, 1]], dtype=torch.uint8)
    rows = LevelPacked(digits, torch.tensor([1.0, 4.0], dtype=torch.bfloat16), 3)
    assert rows.dequantize().tolist() == [[-1.0, 1.0], [4.0, 0.0]]
    shared = LevelPacked(digits, torch.tensor([0.3]), 3)
    assert torch.equal(shared.dequantize(), (digits.float() - 1) * torch.tensor(0.3))


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_what_is_stored_is_all_that_is_needed_and_its_bits_are_counted(levels: int) -> None:
    digits = torch.randint(0, levels, (6, 50), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = LevelPacked(digits, torch.rand(6).to(torch.bfloat16), levels)
    again = LevelPacked.restore(packed.tensors(), levels)
    assert torch.equal(again.dequantize(), packed.dequantize())
    per_row = {2: 7, 3: 10, 4: 13}[levels]
    assert packed.stored_bits() == 8 * (6 * per_row + 6 * 2 + 2 * 8)
