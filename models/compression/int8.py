"""The 8-bit workflow: weights on 8 bits a channel, inputs on 8 bits a tensor with a calibrated range.

`calibrator = "best"` takes the one with the least loss on validation text, and `tolerance` (a key of the stage) leaves
the most sensitive layers as they are until the loss is near the base's; both are done by the driver.
Stored as compressed-tensors `int-quantized`: `weight` int8 [O, I], `weight_scale` [O, 1], `input_scale` [1].

`rescale = "dyadic"` makes a layer's outputs 8-bit integers too, computed without a real number (see `dyadic`). The same
tensors and `output_scale` [1] are then read by our loader, for no public one computes so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from models.compression.base import Calibration, MethodConfig, Packed, Statistics, WeightMethod
from models.compression.formats import int_grid, quantized_input
from models.compression.formats.int8_linear import DyadicPacked, Int8Packed
from models.compression.solvers import range_calibrators
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


_CALIBRATORS = ("max", "p99.9", "p99.99", "p99.999", "p99.9999", "entropy", "mse")


class Config(MethodConfig):
    """Parameters of the 8-bit workflow."""

    calibrator: Literal["max", "p99.9", "p99.99", "p99.999", "p99.9999", "entropy", "mse", "best"] = Field(
        "mse",
        description="range of a layer's input: the largest magnitude, a percentile, least divergence or squared error, "
        "or the best of these on validation text",
    )
    rescale: Literal["float", "dyadic"] = Field(
        "float",
        description="outputs as they are, or on 8 bits by an integer product and a shift, in the calibrator's range",
    )

    @property
    def label(self) -> str:
        """For instance `p99p9`, `mse-dyadic`."""
        return self.calibrator.replace(".", "p") + ("-dyadic" if self.rescale == "dyadic" else "")


def input_range(rows_NI: Tensor, calibrator: str) -> float:
    """Return the largest magnitude among values that is not clipped."""
    if calibrator == "max":
        return range_calibrators.highest(rows_NI)
    if calibrator == "mse":
        return range_calibrators.least_squares(rows_NI)
    if calibrator == "entropy":
        return range_calibrators.entropy(rows_NI)
    if calibrator.startswith("p"):
        return range_calibrators.percentile(rows_NI, float(calibrator[1:]))
    raise ValueError(f"int8: calibrator = {calibrator!r} is decided on a whole model, by the compress stage")


def _scale(rows: Tensor, config: Config) -> Tensor:
    """Return the scale [1] of what the calibrator is shown."""
    scale = input_range(rows, config.calibrator) / 127
    return int_grid.storable(torch.tensor([scale], dtype=torch.float32, device=rows.device))


class Method(WeightMethod[Config], config=Config):
    """The 8-bit workflow."""

    bits: ClassVar[str] = "8, inputs 8"
    calibration: ClassVar[Calibration] = "inputs"
    paper: ClassVar[str] = "Wu et al. 2020, Integer Quantization for Deep Learning Inference (arXiv 2004.09602)"
    not_informative: ClassVar[str] = (
        "weights are rounded to nearest; the choice is the range of the inputs, which only text can judge"
    )

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
        """Return the weight on 8 bits, and the scale of its inputs.

        Raises:
            ValueError: no sample of inputs, or `calibrator = "best"`, which only a whole model can decide.
        """
        rows_NI = statistics.rows("int8", weight_OI.shape[1])
        # The largest input of all tokens is known; the others look at a sample of rows.
        seen = statistics.largest("int8", weight_OI.shape[1]) if config.calibrator == "max" else rows_NI
        fixed = int_grid.fit(weight_OI, int_grid.GridConfig(bits=8, clip="max"))
        codes_OI = int_grid.nearest(weight_OI, fixed).codes_OI
        stored = {
            "weight": codes_OI,
            "weight_scale": fixed.scale_OG.to(torch.bfloat16),
            "input_scale": _scale(seen, config),
        }
        if config.rescale == "dyadic":
            stored["output_scale"] = _scale(rows_NI @ weight_OI.to(rows_NI).T, config)
        return self.restore(stored, config)

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        codes_OI, scale_O1 = tensors["weight"], tensors["weight_scale"]
        if config.rescale == "dyadic":
            return DyadicPacked(codes_OI, scale_O1, tensors["input_scale"], tensors["output_scale"])
        return quantized_input.restore(Int8Packed(codes_OI, scale_O1), tensors)

    def candidates(self, config: Config) -> list[Config]:
        """Return what the driver chooses from on validation text."""
        if config.calibrator != "best":
            return [config]
        return [config.model_copy(update={"calibrator": name}) for name in _CALIBRATORS]
