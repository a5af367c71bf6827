"""Fragments as live views, blocks that cover every element once, and sums of squares accurate enough for 1e-6."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.optim.layout import Fragment, blocks, sums_of_squares, whole_tensors


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 20))
def test_blocks_cover_every_element_once_within_the_limit(sizes: list[int], limit: int) -> None:
    covered = [[0] * size for size in sizes]
    for pieces in blocks(sizes, limit):
        assert 0 < sum(length for _, _, length in pieces) <= limit
        for index, start, length in pieces:
            for position in range(start, start + length):
                covered[index][position] += 1
    assert all(count == 1 for tensor in covered for count in tensor)


def test_small_tensors_share_a_block() -> None:
    assert list(blocks([3, 3, 3], limit=10)) == [[(0, 0, 3), (1, 0, 3), (2, 0, 3)]]


@pytest.mark.parametrize("size", [1, 1000, 1 << 16])
def test_sums_of_squares_are_accurate_to_1e_6(size: int) -> None:
    tensor = torch.rand(size, generator=torch.Generator().manual_seed(0)) + 0.5
    (total,) = sums_of_squares([tensor]).tolist()
    assert total == pytest.approx(float(tensor.double().square().sum()), rel=5e-7)


def test_sums_of_squares_tell_non_finite_values() -> None:
    sums = sums_of_squares(
        [torch.ones(3), torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf]), torch.full((2,), 1e30)]
    )
    assert torch.isfinite(sums).tolist() == [True, False, False, False]


def test_a_master_is_a_live_view_of_its_owner() -> None:
    owner = torch.arange(10.0)
    fragment = Fragment("w", (4, 4), start=8, numel=3, owner=owner, offset=5)
    fragment.master.mul_(2)
    assert owner.tolist() == [0, 1, 2, 3, 4, 10, 12, 14, 8, 9]
    owner.data = torch.zeros(10)
    assert fragment.master.tolist() == [0, 0, 0]


def test_whole_tensors_take_names_or_number_them() -> None:
    pair = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))]
    nameless = whole_tensors([{"params": pair[:1]}, {"params": pair[1:]}])
    assert nameless.shapes == {"group0.param0": (2, 3), "group1.param0": (4,)}
    assert whole_tensors([{"params": pair, "param_names": ["a", "b"]}]).shapes == {"a": (2, 3), "b": (4,)}


def test_a_name_used_twice_is_refused() -> None:
    pair = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="two parameters are named a"):
        whole_tensors([{"params": pair, "param_names": ["a", "a"]}])


def test_a_tensor_that_is_not_contiguous_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(3, 2).T)
    with pytest.raises(ValueError, match="not contiguous"):
        whole_tensors([{"params": [parameter], "param_names": ["turned"]}])
