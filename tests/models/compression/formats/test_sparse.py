"""Masks counted by hand, the bitmask storage, and what every pruning configuration refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.compression.formats import sparse


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
    again = sparse.restore_bitmask(packed.tensors())
    assert torch.equal(again.dequantize(), weight * mask)
    assert packed.stored_bits() == 5 * 24 + 5 * 12 * 32 + 2 * 64
    assert packed.scheme() is None


def test_codes_are_scaled_row_by_row() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    packed = sparse.SparsePacked(mask, torch.tensor([3, -2], dtype=torch.int8), torch.tensor([0.5, 2.0]).bfloat16())
    assert sparse.restore_bitmask(packed.tensors()).dequantize().tolist() == [[1.5, 0.0], [0.0, -4.0]]


@pytest.mark.parametrize(("bits", "storage"), [(4, "packed"), (8, "packed"), (8, "bitmask"), (16, "bitmask")])
def test_any_storage_holds_the_survivors_and_exact_zeros(bits: Any, storage: Any) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    config = sparse.PruneConfig(value_bits=bits, storage=storage)
    mask = sparse.keep(weight.abs(), config)
    packed = sparse.pack(weight, mask, config)
    dense = sparse.restore(packed.tensors(), config).dequantize()
    assert torch.equal(dense, packed.dequantize())
    assert bool((dense[~mask] == 0).all())
    assert torch.allclose(dense[mask], weight[mask], atol=0.3 if bits == 4 else 0.02)


def test_given_grids_are_used_as_they_are() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    config, mask = sparse.PruneConfig(), torch.ones(6, 32, dtype=torch.bool)
    fixed = sparse.fit(2 * weight, config)
    stored = sparse.pack(weight, mask, config, fixed).tensors()["weight_scale"]
    assert torch.equal(stored.float(), fixed.scale_OG)


def test_random_scores_are_always_the_same() -> None:
    one, two = (sparse.random_score(torch.full((3, 5), value)) for value in (0.0, 1.0))
    assert torch.equal(one, two)
    assert len(set(one.flatten().tolist())) == 15


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"value_bits": 16}, r"value_bits = 16 cannot be stored as 'packed'; valid: \(4, 8\)"),
        ({"value_bits": 4, "storage": "bitmask"}, r"valid: \(8, 16, 32\)"),
        ({"pattern": "2:4", "sparsity": 0.3}, "sparsity = 0.3 contradicts the pattern 2:4"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"pattern": "3:4"}, "unstructured"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        sparse.PruneConfig(**values)


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({}, "50-int8"),
        ({"sparsity": 0.625}, "62p5-int8"),
        ({"pattern": "2:4", "value_bits": 4}, "2of4-int4"),
        ({"value_bits": 32, "storage": "bitmask"}, "50-fp32-bitmask"),
    ],
)
def test_labels_name_pattern_and_storage(values: dict[str, Any], label: str) -> None:
    assert sparse.PruneConfig(**values).label == label
