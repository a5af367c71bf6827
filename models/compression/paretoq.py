"""ParetoQ: quantization-aware training at 1, 1.58, 2, 3 and 4 bits, with a learned scale for each row.

    3, 4 bits   LSQ (arXiv 1902.08153): alpha * clip(round(w / alpha), -2^(b-1), 2^(b-1) - 1)
    1.58, 2     SEQ, stretched elastic quantization: levels evenly around zero, alpha * {-2/3, 0, 2/3} and
                alpha * {-3/4, -1/4, 1/4, 3/4}
    1           alpha * sign(w)

All of them are alpha / n * (code + shift) with an integer code. The step alpha / n is rounded to bfloat16, the type it
is stored in, in every forward pass, so what is stored computes exactly what was trained.

Storage: 1.58, 3 and 4 bits fit the integer grids of compressed-tensors and load in plain transformers (1.58 as 2-bit
codes -1, 0, 1). The levels of 1 and 2 bits have no zero and fit none: they are packed as in `levels` and need our
loader; `storage = "public"` stores them as odd codes of a grid that is one bit wider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from models.compression import training_method
from models.compression.base import Packed
from models.compression.formats import int_grid, level_codes
from models.compression.training_method import TrainedConfig, TrainingMethod
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from models.compression.modules.quantized import QuantizedLinear
else:
    torch = lazy_module("torch")


BITS = (1.0, 1.58, 2.0, 3.0, 4.0)


class Config(TrainedConfig):
    """Parameters of ParetoQ."""

    bits: float = Field(2.0, description="bits of a weight: 1, 1.58 (three levels), 2, 3 or 4")
    quantizer: Literal["paretoq", "lsq"] = Field(
        "paretoq", description="the one that suits the bits, or LSQ also at 2 bits"
    )
    storage: Literal["smallest", "public", "ternary5"] = Field(
        "smallest",
        description="smallest: as few bytes as a code needs; public: what plain transformers loads; ternary5: five "
        "three-level weights a byte, our loader",
    )

    @property
    def label(self) -> str:
        """For instance `int3`, `seq2`, `ternary`, `binary`."""
        named = {1.0: "binary", 1.58: "ternary", 2.0: "lsq2" if self.quantizer == "lsq" else "seq2"}
        place = {"smallest": "", "public": "-public", "ternary5": "5"}[self.storage]
        return named.get(self.bits, f"int{self.bits:g}") + place

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, value: float) -> float:
        if value not in BITS:
            raise ValueError(f"bits = {value:g}; valid: {', '.join(f'{b:g}' for b in BITS)}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.storage == "ternary5" and self.bits != 1.58:
            raise ValueError(f"storage = ternary5 holds three levels: bits = {self.bits:g} must be 1.58")
        if self.quantizer == "lsq" and self.bits < 2:
            raise ValueError(f"bits = {self.bits:g}: LSQ needs 2 bits or more")
        return self


@dataclass(frozen=True)
class Scheme:
    """The levels alpha / divisor * (code + shift), for codes from `lowest` to `highest`."""

    divisor: float
    shift: float
    lowest: int
    highest: int
    clip: tuple[float, float]
    """Range of w / alpha inside which a weight moves with its gradient."""
    elastic: bool
    """Whether a weight inside the range tells the scale its rounding error (LSQ); else its sign (1 bit)."""


def scheme(config: Config) -> Scheme:
    """Return the levels that the bits and the quantizer call for."""
    if config.bits == 1:
        return Scheme(0.5, 0.5, -1, 0, (-1.0, 1.0), elastic=False)
    if config.bits == 1.58:
        return Scheme(1.5, 0.0, -1, 1, (-0.99, 0.99), elastic=True)
    if config.bits == 2 and config.quantizer == "paretoq":
        return Scheme(2.0, 0.5, -2, 1, (-0.99, 0.99), elastic=True)
    half = 1 << (int(config.bits) - 1)
    return Scheme(1.0, 0.0, -half, half - 1, (-float(half), half - 1.0), elastic=True)


# ---------------------------------------------------------------------------------------------------------------------
# The quantizer


def start_scale(weight_OI: Tensor, levels_: Scheme) -> Tensor:
    """Return alpha [O] to begin with, bfloat16 values in float32: the mean of |w| (1 bit), or what spans the row."""
    size_OI = weight_OI.detach().float().abs()
    if not levels_.elastic:
        alpha_O = size_OI.mean(1)
    else:
        alpha_O = size_OI.amax(1) / (levels_.highest if levels_.divisor == 1 else 1)
    return alpha_O.clamp(min=1e-8).to(torch.bfloat16).float()


def stored_step(alpha_O: Tensor, levels_: Scheme) -> Tensor:
    """Return the step alpha / divisor [O] as stored, bfloat16."""
    return (alpha_O.detach().float() / levels_.divisor).to(torch.bfloat16)


def codes(weight_OI: Tensor, step_O: Tensor, levels_: Scheme) -> Tensor:
    """Return the integer codes [O, I] as floats."""
    alpha_O1 = (step_O.float() * levels_.divisor).unsqueeze(1)
    inside_OI = (weight_OI.detach().float() / alpha_O1).clamp(*levels_.clip)
    return (inside_OI * levels_.divisor - levels_.shift).round().clamp(levels_.lowest, levels_.highest)


def quantize(weight_OI: Tensor, alpha_O: Tensor, levels_: Scheme) -> Tensor:
    """Return the quantized weight [O, I], with ParetoQ's gradients.

    d/dw      1 inside the clip range, else 0
    d/dalpha  the row's sum of (q - w / alpha) inside, of the outermost level outside (q is the level at alpha = 1;
              at 1 bit: of sign(w) everywhere), over sqrt(numel * top level)
    """
    step_O = stored_step(alpha_O, levels_)
    level_OI = codes(weight_OI, step_O, levels_) + levels_.shift
    exact_OI = (level_OI * step_O.float().unsqueeze(1)).to(weight_OI.dtype)
    if not torch.is_grad_enabled():
        return exact_OI
    ratio_OI = weight_OI.detach().float() / (step_O.float() * levels_.divisor).unsqueeze(1)
    inside_OI = (ratio_OI >= levels_.clip[0]) & (ratio_OI <= levels_.clip[1])
    unit_OI = level_OI / levels_.divisor
    slope_OI = torch.where(inside_OI, unit_OI - ratio_OI, unit_OI) if levels_.elastic else unit_OI
    top = (levels_.highest + levels_.shift) / levels_.divisor
    share = (weight_OI.numel() * top) ** -0.5
    carrier_OI = weight_OI * inside_OI + alpha_O.unsqueeze(1) * (slope_OI * share).to(weight_OI.dtype)
    # The carrier brings the gradients and adds exactly nothing to the value.
    return exact_OI.detach() + (carrier_OI - carrier_OI.detach())


# ---------------------------------------------------------------------------------------------------------------------
# The method


def pack(module: QuantizedLinear, config: Config) -> Packed:
    """Return one layer as stored."""
    chosen = scheme(config)
    step_O = stored_step(module.scale(), chosen)
    codes_OI = codes(module.weight, step_O, chosen)
    bits_, halved = _public_bits(config)
    if bits_:
        shifted_OI = (codes_OI + chosen.shift) * 2 if halved else codes_OI
        scale_O1 = (step_O.float() / (2 if halved else 1)).unsqueeze(1)
        return int_grid.IntPacked(shifted_OI.to(torch.int8), int_grid.Grid(bits_, scale_O1), torch.bfloat16)
    return level_codes.LevelPacked(
        (codes_OI - chosen.lowest).to(torch.uint8), step_O, chosen.highest - chosen.lowest + 1
    )


def _public_bits(config: Config) -> tuple[int, bool]:
    """Return the bits of the public integer grid, 0 for our own layout; and whether its scale is half the step."""
    centred = scheme(config).shift == 0
    if centred and config.storage != "ternary5":
        return (2 if config.bits == 1.58 else int(config.bits)), False
    return (int(config.bits) + 1, True) if config.storage == "public" else (0, False)


class Method(TrainingMethod[Config], config=Config):
    """ParetoQ."""

    bits: ClassVar[str] = "1, 1.58, 2, 3, 4"
    paper: ClassVar[str] = "Liu et al. 2025, ParetoQ (arXiv 2502.02631)"

    def transform(self, model: nn.Module, names: Sequence[str], config: Config) -> None:
        """Quantize every named layer while it trains."""
        import functools

        from models.compression.modules.quantized import QuantizedLinear

        chosen = scheme(config)
        rule = functools.partial(quantize, levels_=chosen)
        linear = training_method.linear_layers(model, names)
        training_method.put_layers(
            model, {n: QuantizedLinear(m, start_scale(m.weight, chosen), rule) for n, m in linear.items()}
        )

    def finish(self, model: nn.Module, config: Config) -> dict[str, Packed]:
        """Return the trained layers as stored."""
        from models.compression.modules.quantized import QuantizedLinear

        found = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
        return {name: pack(module, config) for name, module in found.items()}

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        bits_, _ = _public_bits(config)
        if bits_:
            return int_grid.restore(tensors, bits_)
        chosen = scheme(config)
        return level_codes.LevelPacked.restore(tensors, chosen.highest - chosen.lowest + 1)

    def baselines(self, config: Config) -> dict[str, dict[str, Any]]:
        """Return training in full precision with equal steps, no training at all, and RTN and GPTQ at equal bits."""
        baselines: dict[str, dict[str, Any]] = {
            "continued fp32": config.full_precision(),
            "untrained": config.changed("paretoq", steps=0),
        }
        if config.bits >= 2:
            rounding = {"bits": int(config.bits), "group_size": 0}
            baselines |= {"rtn": {"method": "rtn"} | rounding, "gptq": {"method": "gptq"} | rounding}
        return baselines
