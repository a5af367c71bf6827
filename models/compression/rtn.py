"""Round to nearest: every weight goes to the nearest point of its group's grid. The baseline of all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from models.compression.base import Calibration, Packed, Statistics, WeightMethod
from models.compression.formats import int_grid
from models.compression.formats.quantized_input import RoundingConfig, wrap

if TYPE_CHECKING:
    from torch import Tensor


class Config(RoundingConfig):
    """Parameters of round to nearest."""


class Method(WeightMethod[Config], config=Config):
    """Round to nearest."""

    bits: ClassVar[str] = "2-8"
    calibration: ClassVar[Calibration] = "none"
    paper: ClassVar[str] = "Wu et al. 2020, Integer Quantization for Deep Learning Inference (arXiv 2004.09602)"
    not_informative: ClassVar[str] = "round to nearest is itself the naive baseline"

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:  # noqa: ARG002
        """Return the weight rounded to the nearest grid points."""
        return wrap(int_grid.nearest(weight_OI, int_grid.fit(weight_OI, config)), config.activations)

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        return wrap(int_grid.restore(tensors, config.bits), config.activations)
