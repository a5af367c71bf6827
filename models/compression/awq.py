"""AWQ: input channels with large activations are scaled up before rounding, so that their weights are rounded finer.

The stored grid holds W diag(s); the layer is Q(W diag(s)) diag(1/s). The scales are s = rms(x)^alpha, alpha searched,
then the range of every group is searched; both by the exact error of the layer's outputs, trace(E H E^T), which needs
no activations beside their second moment.

Beside the paper: rms instead of mean |x|, because the second moment holds no other; and where the paper folds 1/s into
the preceding layer, the scales are stored beside the codes (`input_scale` [I] bfloat16, 16 / O bits a weight, counted),
because a layer is compressed here without touching its neighbours. That storage is read by our loader. With
`input_scales = false` only the search of ranges is left, the result is a plain integer grid, and any reader loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from models.compression.base import Calibration, Packed, Statistics, WeightMethod
from models.compression.formats import int_grid
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


class Config(int_grid.GridConfig):
    """Parameters of AWQ."""

    bits: int = Field(4, ge=2, le=8, description="bits of one stored weight")
    group_size: int = Field(
        32, ge=0, le=65536, description="weights that share a scale along a row; 0: the whole row (channel)"
    )
    alphas: int = Field(20, ge=1, le=200, description="exponents of the activation scale that are tried, 0 to 1")
    input_scales: bool = Field(
        True, description="store one scale for each input channel (our loader); false: a plain grid, loads anywhere"
    )


@dataclass(frozen=True)
class ScaledPacked(Packed):
    """Codes of W diag(s), and s."""

    codes: int_grid.IntPacked
    scale_I: Tensor
    """bfloat16, positive."""

    def dequantize(self) -> Tensor:
        """Return the weight [O, I], float32."""
        return self.codes.dequantize() / self.scale_I.to(torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the pack-quantized layout, and `input_scale` [I]."""
        return self.codes.tensors() | {"input_scale": self.scale_I}


def search_scale(weight_OI: Tensor, hessian_II: Tensor, config: Config) -> Tensor:
    """Return the input scales [I], exact in bfloat16, with the least output error among the exponents tried."""
    magnitude_I = hessian_II.diagonal().clamp(min=0).sqrt()
    candidates = [_scale(magnitude_I, step / config.alphas) for step in range(config.alphas + 1)]

    def loss(scale_I: Tensor) -> float:
        scaled_OI = weight_OI.float() * scale_I
        dense_OI = int_grid.nearest(scaled_OI, int_grid.fit(scaled_OI, config)).dequantize() / scale_I
        return output_loss(dense_OI - weight_OI, hessian_II)

    return min(candidates, key=loss)


def output_loss(error_OI: Tensor, hessian_II: Tensor) -> float:
    """Return ||X E^T||^2 = trace(E H E^T)."""
    error_OI = error_OI.double()
    return float((error_OI @ hessian_II * error_OI).sum())


def group_loss(hessian_II: Tensor, weight_OI: Tensor, config: Config) -> Callable[[Tensor], Tensor]:
    """Return the output error of each group alone [O, G] as a function of its weight error [O, G, S]."""
    size = int_grid.group_for(weight_OI.shape[1], config.group_size)
    spans = [slice(start, start + size) for start in range(0, len(hessian_II), size)]
    blocks_GSS = torch.stack([hessian_II[span, span] for span in spans]).float()

    def loss(error_OGS: Tensor) -> Tensor:
        return (torch.einsum("ogs,gst->ogt", error_OGS, blocks_GSS) * error_OGS).sum(-1)

    return loss


def _scale(magnitude_I: Tensor, alpha: float) -> Tensor:
    """Return magnitude^alpha with the geometric middle of its range at one, exact in bfloat16."""
    raised_I = magnitude_I.clamp(min=float(magnitude_I.max()) * 1e-4 or 1.0) ** alpha
    return (raised_I / (raised_I.max() * raised_I.min()).sqrt()).to(torch.bfloat16).float()


class Method(WeightMethod[Config], config=Config):
    """AWQ."""

    bits: ClassVar[str] = "2-8"
    calibration: ClassVar[Calibration] = "hessian"
    paper: ClassVar[str] = "Lin et al. 2023, AWQ (arXiv 2306.00978)"

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
        """Return the weight on a grid whose input scales and ranges fit the activations.

        Raises:
            ValueError: no usable second moment.
        """
        hessian_II = statistics.second_moment("awq", weight_OI.shape[1])
        ones_I = torch.ones(weight_OI.shape[1], device=weight_OI.device)
        scale_I = search_scale(weight_OI, hessian_II, config) if config.input_scales else ones_I
        scaled_OI, moment_II = weight_OI.float() * scale_I, hessian_II / torch.outer(scale_I, scale_I).double()
        codes = int_grid.nearest(scaled_OI, int_grid.fit(scaled_OI, config))
        if config.clip == "mse":
            clipped = int_grid.nearest(
                scaled_OI, int_grid.fit(scaled_OI, config, loss=group_loss(moment_II, scaled_OI, config))
            )
            codes = min(codes, clipped, key=lambda c: output_loss(c.dequantize() - scaled_OI, moment_II))
        return ScaledPacked(codes, scale_I.to(torch.bfloat16)) if config.input_scales else codes

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        codes = int_grid.restore(tensors, config.bits)
        return ScaledPacked(codes, tensors["input_scale"]) if config.input_scales else codes

    def baselines(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:  # noqa: ARG002
        """Return round to nearest in the same storage, input scales of one included."""
        codes = int_grid.nearest(weight_OI, int_grid.fit(weight_OI, config))
        ones = torch.ones(weight_OI.shape[1], dtype=torch.bfloat16, device=weight_OI.device)
        return {"rtn": ScaledPacked(codes, ones) if config.input_scales else codes}
