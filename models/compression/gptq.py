"""GPTQ: round to nearest on the grid of RTN, with each column's error absorbed by the columns still to come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from models.compression.base import Calibration, Packed, Statistics, WeightMethod
from models.compression.formats import int_grid
from models.compression.formats.quantized_input import RoundingConfig, wrap
from models.compression.solvers import obs
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


class Config(RoundingConfig):
    """Parameters of GPTQ."""

    bits: int = Field(4, ge=2, le=8, description="bits of one stored weight")
    group_size: int = Field(
        32, ge=0, le=65536, description="weights that share a scale along a row; 0: the whole row (channel)"
    )
    damp: float = Field(
        0.01, gt=0.0, le=10.0, description="ridge on the second moment, as a share of its mean diagonal"
    )
    order: Literal["natural", "activation"] = Field(
        "activation", description="columns from left to right, or those with the largest inputs first (act-order)"
    )
    keep_zeros: bool = Field(False, description="weights that are zero stay zero: for a pruned base")


class _Rounder:
    """Rounds columns to grids that are fixed before the first column is visited."""

    def __init__(self, weight_OI: Tensor, fixed: int_grid.Grid, order_I: Tensor, keep_zeros: bool) -> None:
        self._grid = fixed
        self._order = order_I.tolist()
        self._size = weight_OI.shape[1] // fixed.scale_OG.shape[1]
        self._zero_OI = weight_OI == 0 if keep_zeros else None

    def begin(self, first: int, weight_OB: Tensor, inverse_B: Tensor) -> None:
        """Need nothing: every grid is fixed."""

    def __call__(self, position: int, weight_O: Tensor) -> Tensor:
        column = self._order[position]
        group = self._grid.column(column // self._size)
        rounded_O = group.decode(group.encode(weight_O[:, None, None])).flatten().to(weight_O.dtype)
        return rounded_O if self._zero_OI is None else rounded_O.masked_fill(self._zero_OI[:, column], 0.0)


def visit_order(hessian_II: Tensor, order: str) -> Tensor:
    """Return the columns in the order of the visit."""
    diagonal_I = hessian_II.diagonal()
    if order == "natural":
        return torch.arange(len(diagonal_I), device=diagonal_I.device)
    return torch.argsort(diagonal_I, descending=True, stable=True)


class Method(WeightMethod[Config], config=Config):
    """GPTQ."""

    bits: ClassVar[str] = "2-8"
    calibration: ClassVar[Calibration] = "hessian"
    paper: ClassVar[str] = "Frantar et al. 2022, GPTQ (arXiv 2210.17323)"

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
        """Return the weight on the same grid as `rtn`, with rounding errors compensated.

        The grids are chosen on the original weight before any column is visited ("static groups"), so an order of
        columns by activation needs no index beside the codes, and the stored bits equal those of `rtn`.

        Raises:
            ValueError: no usable second moment.
        """
        hessian_II = statistics.second_moment("gptq", weight_OI.shape[1])
        order_I = visit_order(hessian_II, config.order)
        fixed = int_grid.fit(weight_OI, config)
        damped_II = obs.damped(hessian_II, statistics.tokens, config.damp)[order_I][:, order_I]
        rounder = _Rounder(weight_OI, fixed, order_I, config.keep_zeros)
        stored_OI = torch.empty_like(weight_OI, dtype=torch.float64)
        stored_OI[:, order_I] = obs.compensate(weight_OI[:, order_I], damped_II, rounder)
        return wrap(int_grid.nearest(stored_OI.to(torch.float32), fixed), config.activations)

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        return wrap(int_grid.restore(tensors, config.bits), config.activations)

    def baselines(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:  # noqa: ARG002
        """Return round to nearest on the very same grid."""
        return {"rtn": wrap(int_grid.nearest(weight_OI, int_grid.fit(weight_OI, config)), config.activations)}
