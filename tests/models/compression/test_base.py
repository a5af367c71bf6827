"""The error measure against the layer outputs it stands for, and what statistics refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.compression import rtn
from models.compression.base import MethodConfig, Statistics, relative_error


def test_the_hessian_error_is_the_error_of_the_layer_outputs(layer: Callable[..., Any]) -> None:
    weight, inputs, seen = layer()
    other = weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    direct = (inputs.double() @ (weight - other).double().T).square().sum()
    direct = direct / (inputs.double() @ weight.double().T).square().sum()
    assert relative_error(weight, other, seen.hessian_II) == pytest.approx(float(direct), rel=1e-6)


def test_without_a_hessian_the_error_is_that_of_the_weights() -> None:
    assert relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]])) == pytest.approx(1 / 25)


def test_an_exact_copy_has_no_error(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    assert relative_error(weight, weight.clone(), seen.hessian_II) == 0.0


def test_a_zero_weight_has_a_finite_error() -> None:
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0.0


def test_missing_statistics_are_refused_by_the_name_of_the_method() -> None:
    with pytest.raises(ValueError, match="gptq needs calibration"):
        Statistics().second_moment("gptq", 4)


def test_statistics_of_another_layer_are_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"\(3, 3\).*4 input features"):
        Statistics(torch.eye(3), 9).second_moment("gptq", 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_overflowed_are_refused(bad: float) -> None:
    hessian = torch.eye(3)
    hessian[1, 1] = bad
    with pytest.raises(ValueError, match="non-finite"):
        Statistics(hessian, 9).second_moment("gptq", 3)


def test_the_packed_forward_is_the_linear_layer_of_the_dequantized_weight(layer: Callable[..., Any]) -> None:
    weight, inputs, seen = layer()
    packed = rtn.Method().compress(weight, seen, rtn.Config(bits=4))
    assert torch.equal(packed.forward(inputs), torch.nn.functional.linear(inputs, packed.dequantize()))
    assert packed.forward(inputs.bfloat16()).dtype == torch.bfloat16


def test_a_method_without_groups_fits_every_width_as_it_is() -> None:
    config = MethodConfig()
    assert config.fitted([3, 5]) is config
    assert config.label == ""
