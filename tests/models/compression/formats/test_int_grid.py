"""Grids against slow, obvious references; storage against compressed-tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.compression.formats import int_grid
from models.compression.formats.int_grid import GridConfig

CONFIGS = [
    GridConfig(bits=8),
    GridConfig(bits=4, group_size=16),
    GridConfig(bits=3, group_size=32, clip="max"),
    GridConfig(bits=2, symmetric=False),
    GridConfig(bits=4, group_size=16, symmetric=False),
    GridConfig(bits=5, group_size=64, clip="max", symmetric=False),
]


def _points(fitted: int_grid.Grid, row: int, group: int) -> list[float]:
    """Every value that the grid of one group can store."""
    zero = 0.0 if fitted.zero_OG is None else float(fitted.zero_OG[row, group])
    scale = fitted.scale_OG[row, group]
    return [float((code - zero) * scale) for code in range(fitted.lowest, -fitted.lowest)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.label}-{c.clip}")
def test_rounding_picks_the_nearest_point_of_the_grid(config: GridConfig, layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(rows=5, columns=64)
    fitted = int_grid.fit(weight, config)
    packed = int_grid.nearest(weight, fitted)
    size = int_grid.group_for(64, config.group_size)
    for row in range(5):
        for column in range(64):
            points = _points(fitted, row, column // size)
            best = min(abs(point - float(weight[row, column])) for point in points)
            found = abs(float(packed.dequantize()[row, column]) - float(weight[row, column]))
            assert found <= best * (1 + 1e-4) + 1e-7


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.label}-{c.clip}")
def test_nearest_points_are_to_the_bit_what_codes_stand_for(config: GridConfig, layer: Callable[..., Any]) -> None:
    """The search for the range compares points without making codes; it must see what will be stored."""
    weight_OI, _, _ = layer(rows=7, columns=64)
    fitted = int_grid.fit(weight_OI, config)
    weight_OGS = int_grid.grouped(weight_OI * 1.7, fitted.scale_OG.shape[1])
    untouched = weight_OGS.clone()
    assert torch.equal(fitted.nearest(weight_OGS), fitted.decode(fitted.encode(weight_OGS)))
    assert torch.equal(weight_OGS, untouched)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.label}-{c.clip}")
def test_storage_is_what_compressed_tensors_unpacks(config: GridConfig, layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(rows=12, columns=64)
    packed = int_grid.nearest(weight, int_grid.fit(weight, config))
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**packed.scheme()))
    stored = packed.tensors() | {"weight_scale": packed.tensors()["weight_scale"].float()}
    theirs = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert torch.equal(theirs, packed.dequantize())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.label}-{c.clip}")
def test_restored_tensors_stand_for_the_same_weight(config: GridConfig, layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(rows=12, columns=64)
    packed = int_grid.nearest(weight, int_grid.fit(weight, config))
    again = int_grid.restore(packed.tensors(), config.bits)
    assert torch.equal(again.dequantize(), packed.dequantize())
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in packed.tensors().items())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.label}-{c.clip}")
def test_a_group_has_no_more_values_than_its_codes(config: GridConfig, layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(rows=4, columns=512)
    dense = int_grid.nearest(weight, int_grid.fit(weight, config)).dequantize()
    size = int_grid.group_for(512, config.group_size)
    counts = [len(set(group.tolist())) for group in dense.reshape(-1, size)]
    assert max(counts) <= 2**config.bits
    assert not torch.equal(dense, weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_largest_weight_is_not_clipped_without_a_search(symmetric: bool, layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(rows=40)
    config = GridConfig(bits=4, clip="max", symmetric=symmetric)
    fitted = int_grid.fit(weight, config)
    error = (int_grid.nearest(weight, fitted).dequantize() - weight).abs()
    assert bool((error <= fitted.scale_OG[:, :1] * 0.5001).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_clip_search_never_raises_the_squared_error(bits: int, symmetric: bool, layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(rows=40)
    errors = {}
    for clip in ("max", "mse"):
        config = GridConfig(bits=bits, clip=clip, symmetric=symmetric, group_size=16)
        dense = int_grid.nearest(weight, int_grid.fit(weight, config)).dequantize()
        errors[clip] = (dense - weight).square().reshape(40, -1, 16).sum(-1)
    assert bool((errors["mse"] <= errors["max"]).all())
    if bits < 8:
        assert errors["mse"].sum() < 0.98 * errors["max"].sum()


def test_scales_are_stored_as_they_were_used(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer()
    scale = int_grid.fit(weight, GridConfig(bits=4, group_size=16)).scale_OG
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)


def test_float32_scales_stand_for_the_same_weight(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(rows=6)
    packed = int_grid.nearest(weight, int_grid.fit(weight, GridConfig(bits=4, group_size=16)))
    wide = packed.widened()
    assert wide.tensors()["weight_scale"].dtype == torch.float32
    assert torch.equal(wide.dequantize(), packed.dequantize())
    assert wide.stored_bits() == packed.stored_bits() + 6 * 4 * 16


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.label}-{c.clip}")
def test_stored_bits_are_codes_scales_zero_points_and_shape(config: GridConfig) -> None:
    rows, columns = 32, 64
    groups = columns // int_grid.group_for(columns, config.group_size)
    packed = int_grid.nearest(torch.randn(rows, columns), int_grid.fit(torch.randn(rows, columns), config))
    expected = rows * columns * config.bits + 16 * rows * groups + 2 * 64
    expected += 0 if config.symmetric else rows * groups * config.bits
    assert packed.stored_bits() == expected


def test_constant_zero_and_one_sided_rows_are_kept(layer: Callable[..., Any]) -> None:
    weight = torch.stack([torch.zeros(16), torch.full((16,), -0.5), torch.linspace(0.1, 1.0, 16)])
    for symmetric in (True, False):
        packed = int_grid.nearest(weight, int_grid.fit(weight, GridConfig(bits=8, symmetric=symmetric)))
        assert torch.equal(packed.dequantize()[0], torch.zeros(16))
        assert (packed.dequantize() - weight).abs().max() < 0.01


def test_zero_stays_exactly_zero(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer()
    weight[:, ::3] = 0.0
    for config in CONFIGS:
        dense = int_grid.nearest(weight, int_grid.fit(weight, config)).dequantize()
        assert bool((dense[:, ::3] == 0).all())


@given(columns=st.integers(1, 300), size=st.integers(0, 300))
def test_a_group_always_divides_its_row(columns: int, size: int) -> None:
    group = int_grid.group_for(columns, size)
    assert columns % group == 0
    assert group <= max(size, 1) or size == 0
    assert group == columns or size


def test_fitted_parameters_give_all_widths_one_scheme() -> None:
    config = GridConfig(bits=4, group_size=64).fitted([256, 688])
    assert config.group_size == math.gcd(256, 688, 64)
    assert GridConfig(bits=4).fitted([256, 688]).group_size == 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bits": 1}, "greater than or equal to 2"),
        ({"bits": 9}, "less than or equal to 8"),
        ({"group_size": -1}, "greater than or equal to 0"),
        ({"clip": "median"}, "mse"),
        ({"grup_size": 4}, "Extra inputs"),
    ],
)
def test_a_bad_grid_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        GridConfig(**values)


@pytest.mark.parametrize(
    ("config", "label"),
    [
        (GridConfig(), "int8-channel"),
        (GridConfig(bits=4, group_size=32), "int4-g32"),
        (GridConfig(bits=4, symmetric=False), "uint4-channel"),
    ],
)
def test_labels_name_the_grid(config: GridConfig, label: str) -> None:
    assert config.label == label
