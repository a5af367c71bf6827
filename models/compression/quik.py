"""QUIK: 4-bit weights and inputs, but for the few input features with outliers, which stay in 16 bits on both sides.

Columns are visited with the outliers last: they are not rounded, so GPTQ pushes the errors of all others into them.
Private layout: the tensors of pack-quantized for the rounded columns (`weight_shape` is theirs), `weight_outliers`
bfloat16 [O, K], and `outlier_index` int32 [K], their places in the row, increasing.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field

from models.compression.base import Calibration, MethodConfig, Packed, Statistics, WeightMethod
from models.compression.formats import int_grid, quantized_input
from models.compression.solvers import obs
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


class Config(MethodConfig):
    """Parameters of QUIK."""

    bits: int = Field(4, ge=3, le=8, description="bits of a stored weight, and of an input feature")
    outliers: float = Field(
        0.0625, ge=0.0, le=0.5, description="share of input features that stay in 16 bits: those with the largest input"
    )
    wide_bits: int = Field(8, ge=3, le=8, description="bits in the layers of `wide`, whose inputs vary most")
    wide: str = Field("*.mlp.down_proj,*.mlp.Wo", description="patterns of those layers, separated by commas")
    damp: float = Field(
        0.01, gt=0.0, le=10.0, description="ridge on the second moment, as a share of its mean diagonal"
    )

    @property
    def label(self) -> str:
        """For instance `int4-k6p25`."""
        return f"int{self.bits}-k{100 * self.outliers:g}".replace(".", "p")

    def for_layer(self, name: str) -> Self:
        """Return the parameters with the bits of layer `name`."""
        wide = any(fnmatch.fnmatchcase(name, pattern.strip()) for pattern in self.wide.split(","))
        return self.model_copy(update={"bits": self.wide_bits}) if wide else self


@dataclass(frozen=True)
class QuikPacked(Packed):
    """Codes for most columns, 16 bits for the others."""

    rounded: int_grid.IntPacked
    """[O, I - K]."""
    outliers_OK: Tensor
    """bfloat16."""
    index_K: Tensor
    """int32, increasing."""

    def dequantize(self) -> Tensor:
        """Return the weight [O, I], float32."""
        kept = self._kept
        shape = (len(self.outliers_OK), len(kept) + len(self.index_K))
        dense_OI = torch.empty(shape, device=self.outliers_OK.device)
        dense_OI[:, kept] = self.rounded.dequantize()
        dense_OI[:, self.index_K.long()] = self.outliers_OK.float()
        return dense_OI

    def tensors(self) -> dict[str, Tensor]:
        """Return codes, scales, outlier columns and their places."""
        return self.rounded.tensors() | {"weight_outliers": self.outliers_OK, "outlier_index": self.index_K}

    def inputs(self, x: Tensor) -> Tensor:
        """Return x with every feature that is no outlier on the levels of its token."""
        kept = self._kept.to(x.device)
        return x.index_copy(-1, kept, quantized_input.round_between(x[..., kept], self.rounded.grid.bits))

    @property
    def _kept(self) -> Tensor:
        columns = self.rounded.codes_OI.shape[1] + len(self.index_K)
        return others(self.index_K, columns)


def others(index_K: Tensor, columns: int) -> Tensor:
    """Return the columns that are not in `index_K`, increasing."""
    mask = torch.ones(columns, dtype=torch.bool, device=index_K.device)
    mask[index_K.long()] = False
    return mask.nonzero().flatten()


class _Rounder:
    """Rounds the first columns of the visit to their row's grid; the others are stored in bfloat16."""

    def __init__(self, fixed: int_grid.Grid, rounded: int) -> None:
        self._grid, self._rounded = fixed, rounded

    def begin(self, first: int, weight_OB: Tensor, inverse_B: Tensor) -> None:
        """Need nothing."""

    def __call__(self, position: int, weight_O: Tensor) -> Tensor:
        if position >= self._rounded:
            return weight_O.to(torch.bfloat16).to(weight_O.dtype)
        return self._grid.decode(self._grid.encode(weight_O[:, None, None])).flatten().to(weight_O.dtype)


def _pack(weight_OI: Tensor, statistics: Statistics, config: Config, score_I: Tensor) -> Packed:
    """Return the weight with the features of the highest scores in 16 bits."""
    columns = weight_OI.shape[1]
    index_K = score_I.argsort(descending=True, stable=True)[: round(config.outliers * columns)].sort().values
    kept = others(index_K, columns)
    fixed = int_grid.fit(weight_OI[:, kept], int_grid.GridConfig(bits=config.bits))
    hessian_II = obs.damped(statistics.second_moment("quik", columns), statistics.tokens, config.damp)
    order = torch.cat([kept, index_K])
    stored = obs.compensate(weight_OI[:, order], hessian_II[order][:, order], _Rounder(fixed, len(kept)))
    rounded = int_grid.nearest(stored[:, : len(kept)].float(), fixed)
    return QuikPacked(rounded, stored[:, len(kept) :].to(torch.bfloat16), index_K.to(torch.int32))


class Method(WeightMethod[Config], config=Config):
    """QUIK."""

    bits: ClassVar[str] = "4, inputs 4; 8 where the input is wide"
    calibration: ClassVar[Calibration] = "inputs"
    paper: ClassVar[str] = "Ashkboos et al. 2023, QUIK: Towards End-to-End 4-Bit Inference (arXiv 2310.09259)"

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
        """Return the weight with the features of the largest inputs in 16 bits.

        Raises:
            ValueError: no second moment or no sample of inputs.
        """
        return _pack(weight_OI, statistics, config, statistics.largest("quik", weight_OI.shape[1]))

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        return QuikPacked(int_grid.restore(tensors, config.bits), tensors["weight_outliers"], tensors["outlier_index"])

    def baselines(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:
        """Return as many features at random in 16 bits, everything else the same."""
        generator = torch.Generator().manual_seed(0)
        score_I = torch.rand(weight_OI.shape[1], generator=generator).to(weight_OI.device)
        return {"random": _pack(weight_OI, statistics, config, score_I)}
