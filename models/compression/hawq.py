"""HAWQ: every layer gets its own width, all widths chosen together under a budget of stored bits.

The loss that layer i adds at b bits is predicted as half its curvature times its rounding error. The curvature is the
mean of the diagonal of the loss's Hessian over the layer, tr(H_i) / n_i, by Hutchinson's estimate. Cheaper ones are the
squared gradients weight by weight, or the error of the layer's own outputs. An integer program picks the widths.

Beside HAWQ-V3: weights only, rounded by GPTQ (or to nearest) on the chosen grid, no dyadic rescaling. Predictions are
made for rounding to nearest. Every width is a public layout, so a variant of mixed widths loads in plain transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from models.compression import gptq
from models.compression.awq import output_loss
from models.compression.base import BitAllocation, Calibration, Cost, Packed, Statistics, WeightMethod
from models.compression.formats import int_grid

if TYPE_CHECKING:
    from torch import Tensor


class Config(gptq.Config):
    """Parameters of mixed widths."""

    budget: float = Field(
        4.75, ge=0.0, le=16.0, description="stored bits a weight, scales included, over all layers; 0: `bits` for all"
    )
    operations_budget: float = Field(
        0.0,
        ge=0.0,
        le=256.0,
        description="a second budget: width of a weight times width of an input (16 where inputs are not rounded), the "
        "mean over all multiplications; 0: none",
    )
    widths: tuple[int, ...] = Field((2, 3, 4, 8), min_length=1, description="widths that a layer may be given")
    sensitivity: Literal["curvature", "gradients", "hessian"] = Field(
        "curvature",
        description="what predicts a layer's loss: the loss's own Hessian, squared gradients, or output errors",
    )
    probes: int = Field(4, ge=1, le=1000, description="random directions a batch, with sensitivity = 'curvature'")
    rounding: Literal["gptq", "nearest"] = Field("gptq", description="how weights are rounded to their grids")
    tied_layers: tuple[str, ...] = Field(
        (), description="patterns on module names; layers that match one of them get the same width"
    )

    @property
    def label(self) -> str:
        """For instance `3p5bits-g32`, or that of GPTQ without a budget."""
        place = f"g{self.group_size}" if self.group_size else "channel"
        return f"{self.budget:g}bits-{place}".replace(".", "p") if self.budget else super().label

    @model_validator(mode="after")
    def _operations_need_an_allocation(self) -> Self:
        if self.operations_budget and not self.budget:
            raise ValueError("operations_budget does nothing here: it goes with budget above 0")
        return self

    @field_validator("widths")
    @classmethod
    def _are_widths(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(widths)) < len(widths) or not all(2 <= width <= 8 for width in widths):
            raise ValueError(f"widths = {list(widths)} must be different numbers from 2 to 8")
        return tuple(sorted(widths))


class Method(WeightMethod[Config], config=Config):
    """HAWQ."""

    bits: ClassVar[str] = "2-8, mixed"
    calibration: ClassVar[Calibration] = "hessian"
    paper: ClassVar[str] = "Yao et al. 2020, HAWQ-V3 (arXiv 2011.10680); Dong et al. 2019, HAWQ-V2 (arXiv 1911.03852)"

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
        """Return the weight at `config.bits`, which the allocation has set.

        Raises:
            ValueError: no usable second moment.
        """
        statistics.second_moment("hawq", weight_OI.shape[1])
        if config.rounding == "nearest":
            return int_grid.nearest(weight_OI, int_grid.fit(weight_OI, config))
        return gptq.Method().compress(weight_OI, statistics, config)

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        return int_grid.restore(tensors, config.bits)

    def baselines(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:
        """Return round to nearest on the same grid; random and uniform widths are added by the driver."""
        return gptq.Method().baselines(weight_OI, statistics, config) if config.rounding == "gptq" else {}

    def allocation(self, config: Config) -> BitAllocation[Config] | None:
        """Return one option for each width; None without a budget."""
        if not config.budget:
            return None
        return BitAllocation(
            options=[
                config.model_copy(update={"bits": width, "budget": 0.0, "operations_budget": 0.0})
                for width in config.widths
            ],
            budget=config.budget,
            sensitivity_source=config.sensitivity,
            probes=config.probes,
            operations_budget=config.operations_budget,
            tied_layers=config.tied_layers,
        )

    def cost(self, weight_OI: Tensor, statistics: Statistics, option: Config) -> Cost:
        """Return size and predicted loss of one layer at the width of `option`.

        With curvature and gradients the loss is in nats, up to one factor for all layers; the output error of a layer
        is relative to its output, because outputs of different layers have different scales.
        """
        packed = int_grid.nearest(weight_OI, int_grid.fit(weight_OI, option))
        error_OI = (packed.dequantize() - weight_OI).double()
        if statistics.curvature is not None:
            loss = max(statistics.curvature, 0.0) * float(error_OI.square().sum()) / 2
        elif statistics.fisher_OI is not None:
            loss = float((statistics.fisher_OI.double() * error_OI.square()).sum()) / 2
        else:
            hessian_II = statistics.second_moment("hawq", weight_OI.shape[1])
            loss = output_loss(error_OI, hessian_II) / max(output_loss(weight_OI, hessian_II), 1e-300)
        inputs = 8 if option.activations == "int8" else 16
        return Cost(packed.stored_bits(), loss, weight_OI.numel() * option.bits * inputs)
