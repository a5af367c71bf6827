"""Round to nearest: every weight goes to the nearest point of its group's grid. The baseline of all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from models.compression.base import Calibration, Kind, Packed, Statistics
from models.compression.formats import int_grid
from models.compression.formats.quantized_input import RoundingConfig, wrap

if TYPE_CHECKING:
    from torch import Tensor

kind: Kind = "weight"
bits = "2-8"
calibration: Calibration = "none"
paper = "Wu et al. 2020, Integer Quantization for Deep Learning Inference (arXiv 2004.09602)"
not_informative = "round to nearest is itself the naive baseline"


class Config(RoundingConfig):
    """Parameters of round to nearest."""


def compress(weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:  # noqa: ARG001 - the contract
    """Return the weight rounded to the nearest grid points."""
    return wrap(int_grid.nearest(weight_OI, int_grid.fit(weight_OI, config)), config.activations)


def restore(tensors: Mapping[str, Tensor], config: Config) -> Packed:
    """Rebuild a packed weight from its stored tensors."""
    return wrap(int_grid.restore(tensors, config.bits), config.activations)


def nulls(weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:  # noqa: ARG001
    """Return no arm: nothing is more naive."""
    return {}
