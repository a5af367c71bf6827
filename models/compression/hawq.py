"""HAWQ: every layer gets its own width, all widths chosen together under a budget of stored bits.

The loss that layer i adds at b bits is predicted as half its curvature times its rounding error. The curvature is the
mean of the diagonal of the loss's Hessian over the layer, tr(H_i) / n_i, by Hutchinson's estimate. Cheaper ones are the
squared gradients weight by weight, or the error of the layer's own outputs. An integer program picks the widths.

Beside HAWQ-V3: weights only, rounded by GPTQ (or to nearest) on the chosen grid, no dyadic rescaling. Predictions are
made for rounding to nearest. Every width is a public layout, so a child of mixed widths loads in plain transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from models.compression import gptq
from models.compression.awq import output_loss
from models.compression.base import Calibration, Kind, Packed, Statistics
from models.compression.formats import int_grid

if TYPE_CHECKING:
    from torch import Tensor

kind: Kind = "weight"
bits = "2-8, mixed"
calibration: Calibration = "hessian"
paper = "Yao et al. 2020, HAWQ-V3 (arXiv 2011.10680); Dong et al. 2019, HAWQ-V2 (arXiv 1911.03852)"
not_informative = ""
restore = gptq.restore


class Config(gptq.Config):
    """Parameters of mixed widths."""

    budget: float = Field(
        4.75, ge=0.0, le=16.0, description="stored bits a weight, scales included, over all layers; 0: `bits` for all"
    )
    widths: tuple[int, ...] = Field((2, 3, 4, 8), min_length=1, description="widths that a layer may be given")
    sensitivity: Literal["curvature", "gradients", "hessian"] = Field(
        "curvature",
        description="what predicts a layer's loss: the loss's own Hessian, squared gradients, or output errors",
    )
    probes: int = Field(4, ge=1, le=1000, description="random directions a batch, with sensitivity = 'curvature'")
    rounding: Literal["gptq", "nearest"] = Field("gptq", description="how weights are rounded to their grids")
    together: tuple[str, ...] = Field(
        (), description="patterns on module names; layers that match one of them get the same width"
    )

    @property
    def label(self) -> str:
        """For instance `3p5bits-g32`, or that of GPTQ without a budget."""
        place = f"g{self.group_size}" if self.group_size else "channel"
        return f"{self.budget:g}bits-{place}".replace(".", "p") if self.budget else super().label

    @field_validator("widths")
    @classmethod
    def _are_widths(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(widths)) < len(widths) or not all(2 <= width <= 8 for width in widths):
            raise ValueError(f"widths = {list(widths)} must be different numbers from 2 to 8")
        return tuple(sorted(widths))


def compress(weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
    """Return the weight at `config.bits`, which planning has set.

    Raises:
        ValueError: no usable second moment.
    """
    statistics.second_moment("hawq", weight_OI.shape[1])
    if config.rounding == "nearest":
        return int_grid.nearest(weight_OI, int_grid.fit(weight_OI, config))
    return gptq.compress(weight_OI, statistics, config)


def nulls(weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:
    """Return round to nearest on the same grid; random and uniform widths are arms of the plan."""
    return gptq.nulls(weight_OI, statistics, config) if config.rounding == "gptq" else {}


def choices(config: Config) -> list[Config]:
    """Return one set of parameters for each width; none without a budget."""
    return [config.model_copy(update={"bits": width, "budget": 0.0}) for width in config.widths if config.budget]


def sees(config: Config) -> str:
    """Return what `price` needs."""
    return config.sensitivity


def price(weight_OI: Tensor, statistics: Statistics, choice: Config) -> tuple[int, float]:
    """Return (stored bits, predicted loss) of one layer at the width of `choice`.

    With curvature and gradients the loss is in nats, up to one factor for all layers; the output error of a layer is
    relative to its output, because outputs of different layers have different scales.
    """
    packed = int_grid.nearest(weight_OI, int_grid.fit(weight_OI, choice))
    error_OI = (packed.dequantize() - weight_OI).double()
    if statistics.curvature is not None:
        loss = max(statistics.curvature, 0.0) * float(error_OI.square().sum()) / 2
    elif statistics.fisher_OI is not None:
        loss = float((statistics.fisher_OI.double() * error_OI.square()).sum()) / 2
    else:
        hessian_II = statistics.second_moment("hawq", weight_OI.shape[1])
        loss = output_loss(error_OI, hessian_II) / max(output_loss(weight_OI, hessian_II), 1e-300)
    return packed.stored_bits(), loss
