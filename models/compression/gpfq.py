"""GPFQ: greedy path following. Each weight is rounded so that the running error of the layer's outputs stays small.

For a row w and columns X_t of the inputs in the original model, X~_t behind the blocks already compressed, the error
u starts at zero; for t = 1, 2, ...: u += w_t X_t, q_t = nearest(<X~_t, u> / ||X~_t||^2), u -= q_t X~_t. Nothing is
inverted and no later weight is changed; the relative output error falls about as m log(I) / I for m tokens and I
inputs that are in general position, where that of rounding stays.

Beside the paper: the step of the alphabet {-M..M} is fitted for every row (`step = "layer"` is the paper's rule), and
hard thresholding keeps the plain alphabet, whose codes any reader knows, instead of one shifted by the threshold.
Shapes: N sampled tokens, O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from models.compression.base import Calibration, MethodConfig, Packed, Statistics, WeightMethod
from models.compression.formats import int_grid
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


_SHRINKS = tuple(1.0 - 0.03 * step for step in range(26))
"""Fractions of the largest weight of a row that are tried as the largest level: 1.00 down to 0.25."""


class Config(MethodConfig):
    """Parameters of GPFQ."""

    bits: int = Field(4, ge=2, le=8, description="bits of one stored weight; levels -M..M with M = 2^(bits-1) - 1")
    step: Literal["row", "layer"] = Field(
        "row", description="spacing of the levels: least squared error of each row, or one for the layer (paper)"
    )
    radius: float = Field(1.0, gt=0.0, le=10.0, description="with step = 'layer': largest level, in quantiles")
    percentile: float = Field(0.99, gt=0.0, le=1.0, description="with step = 'layer': which quantile of |w| of a row")
    threshold: Literal["none", "soft", "hard"] = Field(
        "none", description="zero out what is small: shrinking the rest (L1), or leaving it (L0)"
    )
    level: float = Field(0.0, ge=0.0, le=100.0, description="the threshold, in steps; a hard one matters above 0.5")
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest", description="to the nearest level, or up with the probability of the remainder"
    )
    rounding_seed: int = Field(0, ge=0, description="seed of stochastic rounding")

    @property
    def label(self) -> str:
        """For instance `int4-channel`, `int3-channel-soft0p5`."""
        sparse = f"-{self.threshold}{self.level:g}".replace(".", "p") if self.threshold != "none" else ""
        return f"int{self.bits}-channel{sparse}" + ("-stochastic" if self.rounding == "stochastic" else "")

    @model_validator(mode="after")
    def _threshold_and_level_agree(self) -> Self:
        if (self.threshold == "none") != (self.level == 0.0):
            raise ValueError(f"threshold = {self.threshold!r} and level = {self.level:g} contradict each other")
        return self


def greedy(
    weight_OI: Tensor, reference_NI: Tensor, inputs_NI: Tensor, choose: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Return the stored weight [O, I], float64.

    Args:
        weight_OI: the weight.
        reference_NI: its inputs in the original model.
        inputs_NI: the same rows in the compressed one.
        choose: (column, wanted values [O]) -> stored values [O].
    """
    stored_OI, weight_OI = torch.empty_like(weight_OI, dtype=torch.float64), weight_OI.double()
    reference_IN, inputs_IN = reference_NI.double().T.contiguous(), inputs_NI.double().T.contiguous()
    error_ON = torch.zeros(len(weight_OI), len(inputs_NI), dtype=torch.float64, device=weight_OI.device)
    for column, (ideal_N, seen_N) in enumerate(zip(reference_IN, inputs_IN, strict=True)):
        error_ON.addr_(weight_OI[:, column], ideal_N)
        energy = float(seen_N @ seen_N)
        wanted_O = error_ON @ seen_N / energy if energy else weight_OI[:, column]
        stored_OI[:, column] = choose(column, wanted_O)
        error_ON.addr_(stored_OI[:, column], seen_N, alpha=-1)
    return stored_OI


def steps(weight_OI: Tensor, config: Config) -> Tensor:
    """Return the spacing of the levels of each row [O], float32, positive, exact in bfloat16."""
    most = (1 << (config.bits - 1)) - 1
    magnitude_OI = weight_OI.float().abs()
    if config.step == "layer":
        widest = torch.quantile(magnitude_OI, config.percentile, dim=1).mean() * config.radius
        return _storable((widest / most).expand(len(weight_OI)))
    tried = [_storable(magnitude_OI.amax(1) * shrink / most) for shrink in _SHRINKS]
    errors = [_squared_error(magnitude_OI, scale_O, most) for scale_O in tried]
    best_O = torch.stack(errors).argmin(0)
    return torch.stack(tried).gather(0, best_O.unsqueeze(0)).squeeze(0)


def nearest_level(wanted_O: Tensor, scale_O: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """Return the levels that values [O] are stored as."""
    most = (1 << (config.bits - 1)) - 1
    scaled_O = wanted_O.double() / scale_O
    small_O = scaled_O.abs() <= config.level
    if config.threshold == "soft":
        scaled_O = scaled_O.sign() * (scaled_O.abs() - config.level).clamp(min=0)
    if config.rounding == "stochastic":
        draw_O = torch.rand(scaled_O.shape, generator=generator, dtype=torch.float64)
        code_O = (scaled_O + draw_O.to(scaled_O.device)).floor()
    else:
        code_O = scaled_O.round()
    if config.threshold == "hard":
        code_O = torch.where(small_O, 0.0, code_O)
    return code_O.clamp(-most, most) * scale_O


def _pack(stored_OI: Tensor, scale_O: Tensor, config: Config) -> Packed:
    return int_grid.nearest(stored_OI, int_grid.Grid(config.bits, scale_O.unsqueeze(1)))


def _squared_error(magnitude_OI: Tensor, scale_O: Tensor, most: int) -> Tensor:
    scale_O1 = scale_O.unsqueeze(1)
    return ((magnitude_OI / scale_O1).round().clamp(max=most) * scale_O1 - magnitude_OI).square().sum(1)


def _storable(scale_O: Tensor) -> Tensor:
    rounded_O = scale_O.to(torch.bfloat16).float()
    return torch.where(rounded_O > 0, rounded_O, torch.ones_like(rounded_O))


def _inputs(rows_NI: Tensor | None, name: str, columns: int) -> Tensor:
    if rows_NI is None:
        raise ValueError(f"gpfq needs calibration: statistics.{name} is None")
    if rows_NI.ndim != 2 or rows_NI.shape[1] != columns:
        raise ValueError(f"gpfq: {name} has shape {tuple(rows_NI.shape)}; the layer has {columns} input features")
    return rows_NI


class Method(WeightMethod[Config], config=Config):
    """GPFQ."""

    bits: ClassVar[str] = "2 (ternary) - 8"
    calibration: ClassVar[Calibration] = "inputs"
    paper: ClassVar[str] = (
        "Zhang, Zhou and Saab 2022, Post-training Quantization for Neural Networks with Provable Guarantees "
        "(arXiv 2201.11113)"
    )

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
        """Return the weight on a symmetric row grid.

        Raises:
            ValueError: no inputs were recorded, or not those of this layer.
        """
        inputs_NI = _inputs(statistics.inputs_NI, "inputs_NI", weight_OI.shape[1])
        reference_NI = _inputs(statistics.reference_NI, "reference_NI", weight_OI.shape[1])
        scale_O = steps(weight_OI, config)
        generator = torch.Generator().manual_seed(config.rounding_seed)
        stored_OI = greedy(
            weight_OI, reference_NI, inputs_NI, lambda _, wanted_O: nearest_level(wanted_O, scale_O, config, generator)
        )
        return _pack(stored_OI, scale_O, config)

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        return int_grid.restore(tensors, config.bits)

    def baselines(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:  # noqa: ARG002
        """Return round to nearest on the very same alphabet."""
        scale_O = steps(weight_OI, config)
        plain = Config(bits=config.bits)
        rounded_IO = [nearest_level(column_O, scale_O, plain, torch.Generator()) for column_O in weight_OI.T]
        return {"rtn": _pack(torch.stack(rounded_IO, dim=1), scale_O, config)}
