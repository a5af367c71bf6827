"""Fragments as live views, and sums per tensor over blocks and ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.optim.fragment_layout import Fragment, Layout, TensorSums, whole_tensors


def test_a_master_is_a_live_view_of_its_owner() -> None:
    partition = torch.arange(10.0)
    fragment = Fragment("w", (4, 4), start=8, numel=3, partition=partition, offset=5)
    fragment.master.mul_(2)
    assert partition.tolist() == [0, 1, 2, 3, 4, 10, 12, 14, 8, 9]
    partition.data = torch.zeros(10)
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


def test_sums_are_added_up_in_float64_over_blocks_and_ranks() -> None:
    layout = whole_tensors([{"params": [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]}])
    both = Layout(layout.fragments, layout.shapes, layout.partition_of, reduce=lambda sums: 2 * sums)
    sums = TensorSums(2, both)
    sums.add(0, 1, [torch.tensor(2.0**25), torch.tensor(1.0)])
    sums.add_rows([1], torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    assert sums.over_ranks().tolist() == [[0.0, 6.0], [2.0 * (2**25 + 1), 8.0]]


def test_a_rank_without_a_part_takes_part_in_the_sum_with_zeros() -> None:
    layout = whole_tensors([{"params": [nn.Parameter(torch.ones(2))]}])
    given = []
    both = Layout((), layout.shapes, layout.partition_of, reduce=lambda sums: given.append(sums.clone()) or sums + 1)
    assert TensorSums(1, both).over_ranks().tolist() == [[1.0]]
    assert given[0].tolist() == [[0.0]]
