"""FP8: weights and inputs as 8-bit floating-point numbers, a scale for each output channel and one for all inputs.

E4M3 is stored as compressed-tensors `float-quantized`: `weight` float8_e4m3fn, `weight_scale` [O, 1] and `input_scale`
[1]. No maintained reader of checkpoints takes E5M2, whose range is made for gradients: that needs our loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from models.compression.base import Calibration, MethodConfig, Packed, Statistics, WeightMethod
from models.compression.formats import int_grid
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


class Config(MethodConfig):
    """Parameters of FP8."""

    form: Literal["e4m3", "e5m2"] = Field(
        "e4m3", description="four bits of exponent and three of mantissa, or five and two: more range, less precision"
    )
    margin: int = Field(0, ge=0, le=8, description="powers of two left free above the largest input seen")

    @property
    def label(self) -> str:
        """For instance `e4m3`."""
        return self.form


@dataclass(frozen=True)
class FloatPacked(Packed):
    """One byte a weight; its inputs are rounded to the same format."""

    codes_OI: Tensor
    """float8_e4m3fn or float8_e5m2."""
    scale: Tensor
    """[O, 1]."""
    input_scale: Tensor
    """[1] float32."""

    @property
    def storage(self) -> str:
        """Return the layout."""
        return "float-quantized"

    def dequantize(self) -> Tensor:
        """Return the weight [O, I], float32."""
        return self.codes_OI.float() * self.scale.float()

    def tensors(self) -> dict[str, Tensor]:
        """Return codes and scales."""
        return {"weight": self.codes_OI, "weight_scale": self.scale, "input_scale": self.input_scale}

    def inputs(self, x: Tensor) -> Tensor:
        """Return x rounded to the format, saturating."""
        scale = self.input_scale.to(x.device)
        return (rounded(x.float() / scale, self.codes_OI.dtype).float() * scale).to(x.dtype)

    def scheme(self) -> dict[str, Any] | None:
        """Return the compressed-tensors arguments of the weight; None for E5M2."""
        return _arguments("channel") if self.codes_OI.dtype == torch.float8_e4m3fn else None

    def input_scheme(self) -> dict[str, Any] | None:
        """Return the compressed-tensors arguments of the inputs."""
        return _arguments("tensor") if self.codes_OI.dtype == torch.float8_e4m3fn else None

    def widened(self) -> Packed:
        """Return the same codes with a float32 scale."""
        return replace(self, scale=self.scale.float())


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in an 8-bit floating-point type: the nearest, ties to even, the largest for what lies beyond.

    torch rounds so, but makes infinity or NaN of what lies beyond; NaN stays NaN.
    """
    largest = torch.finfo(dtype).max
    return values.float().clamp(-largest, largest).to(dtype)


def scale_of(highest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32, exact in bfloat16: what takes the largest magnitudes to the largest of the type."""
    return int_grid.storable((highest / torch.finfo(dtype).max).float())


def dtype_of(config: Config) -> torch.dtype:
    """Return the type that a configuration names."""
    return torch.float8_e4m3fn if config.form == "e4m3" else torch.float8_e5m2


def _arguments(strategy: Literal["channel", "tensor"]) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}


class Method(WeightMethod[Config], config=Config):
    """FP8."""

    bits: ClassVar[str] = "8, inputs 8"
    calibration: ClassVar[Calibration] = "inputs"
    paper: ClassVar[str] = "Micikevicius et al. 2022, FP8 Formats for Deep Learning (arXiv 2209.05433)"
    not_informative: ClassVar[str] = "a fixed code whose scales are those of the largest values: nothing is chosen"

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
        """Return the weight in FP8, and the scale of its inputs.

        Raises:
            ValueError: no sample of inputs.
        """
        highest_I, dtype = statistics.largest("fp8", weight_OI.shape[1]), dtype_of(config)
        scale = scale_of(weight_OI.abs().amax(1, keepdim=True), dtype)
        input_scale = scale_of(highest_I.max().reshape(1), dtype) * 2**config.margin
        return FloatPacked(rounded(weight_OI.float() / scale, dtype), scale.to(torch.bfloat16), input_scale)

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        codes_OI = tensors["weight"].view(dtype_of(config))
        return FloatPacked(codes_OI, tensors["weight_scale"], tensors["input_scale"])
