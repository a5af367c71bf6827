"""8-bit weights that meet 8-bit inputs: with real outputs, and with outputs that are 8-bit integers too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from models.compression.base import Packed
from models.compression.formats import dyadic, quantized_input
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


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

    def scheme(self) -> dict[str, Any] | None:
        """Return the compressed-tensors arguments of the weight."""
        return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}

    def widened(self) -> Packed:
        """Return the same codes with float32 scales."""
        return replace(self, scale_O1=self.scale_O1.float())


@dataclass(frozen=True)
class DyadicPacked(Int8Packed):
    """An 8-bit layer whose outputs are 8-bit integers too, computed in integers from end to end.

    What lies between such layers (bias, norm, softmax, residual sum) stays real: it reads output code times scale.
    """

    input_scale: Tensor
    """[1] float32."""
    output_scale: Tensor
    """[1] float32."""

    def tensors(self) -> dict[str, Tensor]:
        """Return codes and the three scales, from which b and c follow."""
        scales = {"weight_scale": self.scale_O1, "input_scale": self.input_scale, "output_scale": self.output_scale}
        return {"weight": self.codes_OI} | scales

    def scheme(self) -> None:
        """Return nothing: no public reader rounds outputs so."""

    def inputs(self, x: Tensor) -> Tensor:
        """Return x [..., I] rounded to the integers of its scale."""
        return quantized_input.round_to(x, self.input_scale.to(x.device, x.dtype), 8)

    def sums(self, x: Tensor) -> Tensor:
        """Return the sums of integer products [..., O], int32."""
        codes = (x / self.input_scale.to(x.device, x.dtype)).round().clamp(-128, 127)
        # float64 adds whole numbers below 2^53 exactly, on any device.
        return torch.nn.functional.linear(codes.double(), self.codes_OI.to(x.device).double()).to(torch.int32)

    def output_codes(self, sums: Tensor) -> Tensor:
        """Return the output's integers [..., O] of sums [..., O], int64 between -128 and 127."""
        real_O = self.scale_O1.double().flatten() * self.input_scale.double() / self.output_scale.double()
        factor_O, shift_O = (whole.to(sums.device) for whole in dyadic.dyadic(real_O))
        return dyadic.requantize(sums, factor_O, shift_O).clamp(-128, 127)

    def product(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return codes times scale [..., O] in the dtype of x, plus the bias."""
        y = self.output_codes(self.sums(x)).to(x.dtype) * self.output_scale.to(x.device, x.dtype)
        return y if bias_O is None else y + bias_O
