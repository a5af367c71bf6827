"""The 8-bit workflow: weights on 8 bits a channel, inputs on 8 bits a tensor with a calibrated range.

`calibrator = "best"` takes the one with the least loss on validation text, and `tolerance` (a key of the stage) leaves
the most sensitive layers as they are until the loss is near the parent's; both are done by the driver.
Stored as compressed-tensors `int-quantized`: `weight` int8 [O, I], `weight_scale` [O, 1], `input_scale` [1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from models.compression import activations, grid, ranges
from models.compression.base import Calibration, Kind, MethodConfig, Packed, Statistics
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

kind: Kind = "weight"
bits = "8, inputs 8"
calibration: Calibration = "inputs"
paper = "Wu et al. 2020, Integer Quantization for Deep Learning Inference (arXiv 2004.09602)"
not_informative = "weights are rounded to nearest; the choice is the range of the inputs, which only text can judge"

_CALIBRATORS = ("max", "p99.9", "p99.99", "p99.999", "p99.9999", "entropy", "mse")


class Config(MethodConfig):
    """Parameters of the 8-bit workflow."""

    calibrator: Literal["max", "p99.9", "p99.99", "p99.999", "p99.9999", "entropy", "mse", "best"] = Field(
        "mse",
        description="range of a layer's input: the largest magnitude, a percentile, least divergence or squared error, "
        "or the best of these on validation text",
    )

    @property
    def label(self) -> str:
        """For instance `p99p9`."""
        return self.calibrator.replace(".", "p")


@dataclass(frozen=True)
class Int8Packed(Packed):
    """One byte a weight, one scale a row."""

    codes_OI: Tensor
    """int8."""
    scale_O1: Tensor
    """bfloat16, or float32 after `widened`."""

    @property
    def storage(self) -> str:
        """Return the layout."""
        return "int-quantized"

    def dequantize(self) -> Tensor:
        """Return the weight [O, I], float32."""
        return self.codes_OI.float() * self.scale_O1.float()

    def tensors(self) -> dict[str, Tensor]:
        """Return codes and scales."""
        return {"weight": self.codes_OI, "weight_scale": self.scale_O1}

    def scheme(self) -> dict[str, Any]:
        """Return the compressed-tensors arguments of the weight."""
        return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}

    def widened(self) -> Packed:
        """Return the same codes with float32 scales."""
        return replace(self, scale_O1=self.scale_O1.float())


def compress(weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
    """Return the weight on 8 bits, and the scale of its inputs.

    Raises:
        ValueError: no sample of inputs, or `calibrator = "best"`, which only a whole model can decide.
    """
    top = input_range(statistics.rows("int8", weight_OI.shape[1]), config.calibrator)
    fixed = grid.fit(weight_OI, grid.GridConfig(bits=8, clip="max"))
    codes_OI = grid.nearest(weight_OI, fixed).codes_OI
    weight = Int8Packed(codes_OI, fixed.scale_OG.to(torch.bfloat16))
    scale = grid.storable(torch.tensor([top / 127], dtype=torch.float32))
    return activations.InputPacked(weight, scale=scale)


def restore(tensors: Mapping[str, Tensor], config: Config) -> Packed:  # noqa: ARG001 - the contract
    """Rebuild a packed weight from its stored tensors."""
    return activations.restore(Int8Packed(tensors["weight"], tensors["weight_scale"]), tensors)


def nulls(weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:  # noqa: ARG001
    """Return no arm: the weight itself leaves no choice."""
    return {}


def candidates(config: Config) -> list[Config]:
    """Return what the driver chooses from on validation text."""
    if config.calibrator != "best":
        return [config]
    return [Config.model_validate({"calibrator": name}) for name in _CALIBRATORS]


def input_range(rows_NI: Tensor, calibrator: str) -> float:
    """Return the largest input that keeps its magnitude."""
    if calibrator == "max":
        return ranges.highest(rows_NI)
    if calibrator == "mse":
        return ranges.least_squares(rows_NI)
    if calibrator == "entropy":
        return ranges.entropy(rows_NI)
    if calibrator.startswith("p"):
        return ranges.percentile(rows_NI, float(calibrator[1:]))
    raise ValueError(f"int8: calibrator = {calibrator!r} is decided on a whole model, by the compress stage")
