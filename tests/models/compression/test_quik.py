"""QUIK on one layer whose inputs have outlier features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.compression import quik
from models.compression.base import Packed, Statistics, relative_error

LARGE = [3, 17, 40, 41]


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Statistics]:
    """A weight [32, 64], and correlated inputs of which four features are 60 times as large."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(64) + torch.randn(64, 64, generator=generator) / 8
    rows = torch.randn(600, 64, generator=generator) @ mixing
    rows[:, LARGE] *= 60
    weight = torch.randn(32, 64, generator=generator)
    weight[:, LARGE] /= 60
    return weight, Statistics(rows.double().T @ rows.double(), len(rows), inputs_NI=rows)


def output_error(packed: Packed, layer: tuple[Tensor, Statistics]) -> float:
    """Return the relative squared error of the layer's output, inputs rounded."""
    weight, seen = layer
    rows = seen.rows("quik", 64)
    exact = rows @ weight.T
    return float((packed.forward(rows) - exact).square().sum() / exact.square().sum())


def test_the_features_with_the_largest_inputs_stay_in_16_bits(layer: tuple[Tensor, Statistics]) -> None:
    packed = quik.Method().compress(*layer, quik.Config())
    assert packed.tensors()["outlier_index"].tolist() == LARGE
    x = layer[1].rows("quik", 64)
    rounded = packed.inputs(x)
    assert torch.equal(rounded[:, LARGE], x[:, LARGE])
    others = [i for i in range(64) if i not in LARGE]
    assert max(len(row.unique()) for row in rounded[:, others]) <= 16
    assert float((rounded[:, others] - x[:, others]).abs().max()) > 0.05


def test_outlier_features_rescue_four_bit_inputs_and_random_ones_do_not(layer: tuple[Tensor, Statistics]) -> None:
    weight, seen = layer
    mine = output_error(quik.Method().compress(weight, seen, quik.Config()), layer)
    none = output_error(quik.Method().compress(weight, seen, quik.Config(outliers=0.0)), layer)
    random = output_error(quik.Method().baselines(weight, seen, quik.Config())["random"], layer)
    assert mine < 0.03
    assert none > 10 * mine
    assert random > 10 * mine


def test_errors_are_pushed_into_the_columns_that_stay(layer: tuple[Tensor, Statistics]) -> None:
    """The outlier columns of the stored weight are moved to make up for the rounding of the others."""
    weight, seen = layer
    packed = quik.Method().compress(weight, seen, quik.Config())
    dense = packed.dequantize()
    assert not torch.equal(dense[:, LARGE], weight[:, LARGE].to(torch.bfloat16).float())
    unmoved = dense.clone()
    unmoved[:, LARGE] = weight[:, LARGE]
    mine = relative_error(weight, dense, seen.hessian_II)
    assert mine < relative_error(weight, unmoved, seen.hessian_II)


def test_wide_layers_get_more_bits() -> None:
    config = quik.Config()
    assert config.for_layer("model.layers.0.mlp.down_proj").bits == 8
    assert config.for_layer("model.layers.0.mlp.up_proj") is config
    assert quik.Config(wide="").for_layer("model.layers.0.mlp.down_proj").bits == 4


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_stored_tensors_rebuild_the_layer(bits: int, layer: tuple[Tensor, Statistics]) -> None:
    config = quik.Config(bits=bits, outliers=0.1)
    packed = quik.Method().compress(*layer, config)
    again = quik.Method().restore(packed.tensors(), config)
    assert torch.equal(again.dequantize(), packed.dequantize())
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again.inputs(x), packed.inputs(x))
    assert torch.equal(again.forward(x), packed.forward(x))


def test_others_are_the_rest_in_order() -> None:
    assert quik.others(torch.tensor([1, 3], dtype=torch.int32), 6).tolist() == [0, 2, 4, 5]
    assert quik.others(torch.tensor([], dtype=torch.int32), 2).tolist() == [0, 1]
