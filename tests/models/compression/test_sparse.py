"""Masks counted by hand, and the bitmask storage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.compression import sparse


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.73])
def test_each_row_loses_its_lowest_share(sparsity: float) -> None:
    score = torch.rand(9, 40, generator=torch.Generator().manual_seed(0))
    mask = sparse.keep_share(score, sparsity)
    for row in range(9):
        dropped = sorted(score[row].tolist())[: round(sparsity * 40)]
        assert score[row][~mask[row]].sort().values.tolist() == dropped


def test_ties_fall_to_the_left() -> None:
    assert sparse.keep_share(torch.ones(1, 4), 0.5).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8), (1, 4)])
def test_a_pattern_keeps_the_highest_of_each_run(kept: int, of: int) -> None:
    score = torch.rand(6, 32, generator=torch.Generator().manual_seed(0))
    mask = sparse.keep_pattern(score, kept, of)
    for row in range(6):
        for start in range(0, 32, of):
            run = score[row, start : start + of]
            best = run.sort(descending=True).values[:kept].sort().values
            assert torch.equal(run[mask[row, start : start + of]].sort().values, best)


def test_a_pattern_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2:4 pattern does not fit rows of 6"):
        sparse.keep_pattern(torch.ones(2, 6), 2, 4)


@given(rows=st.integers(1, 5), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_masks_survive_packing(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.5
    packed = sparse.pack_bits(mask)
    assert packed.shape == (rows, -(-columns // 8))
    assert torch.equal(sparse.unpack_bits(packed, columns), mask)


def test_the_lowest_bit_is_the_first_weight() -> None:
    mask = torch.tensor([[True, False, False, True, False, False, False, False, True]])
    assert sparse.pack_bits(mask).tolist() == [[9, 1]]


def test_stored_weights_come_back_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 24, generator=generator)
    mask = sparse.keep_share(torch.rand(5, 24, generator=generator), 0.5)
    packed = sparse.SparsePacked(mask, weight[mask])
    again = sparse.restore(packed.tensors())
    assert torch.equal(again.dequantize(), weight * mask)
    assert packed.stored_bits() == 5 * 24 + 5 * 12 * 32 + 2 * 64
    assert packed.scheme() is None


def test_codes_are_scaled_row_by_row() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    packed = sparse.SparsePacked(mask, torch.tensor([3, -2], dtype=torch.int8), torch.tensor([0.5, 2.0]).bfloat16())
    assert sparse.restore(packed.tensors()).dequantize().tolist() == [[1.5, 0.0], [0.0, -4.0]]
