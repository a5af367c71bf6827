"""BitNet b1.58: three-level weights and 8-bit activations, trained from scratch or converted from a trained model.

    W_q = clip(round(W / g), -1, 1) * g          g = mean |W| of the matrix (b1.58), or its median (Reloaded)
    x_q = round(127 x / max|x|) * max|x| / 127   for each token
    y   = x_q W_q^T

Gradients pass both roundings unchanged. The matrix is stored as five weights a byte and one float32 scale (see
`levels`), and the layer that reads it quantizes its input in the same way: our loader is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from models.architectures.config import Shape
from models.compression import training_method
from models.compression.base import Packed
from models.compression.formats import level_codes
from models.compression.training_method import TrainedConfig, TrainingMethod
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy_module("torch")


_EPSILON = 1e-5
_NORM_EPSILON = 1e-6


class Config(TrainedConfig):
    """Parameters of BitNet b1.58."""

    init_from: Literal["base", "scratch"] = Field(
        "base", description="convert the base, or train a model of its shape from random weights"
    )
    scale: Literal["mean", "median"] = Field("mean", description="scale of a matrix: mean or median of |W|")
    activation_bits: Literal[0, 8] = Field(8, description="bits of the inputs of a layer; 0 leaves them as they are")
    norm: bool = Field(False, description="normalise the input of every layer before it is quantized (SubLN)")
    widen: int = Field(
        1, ge=1, le=8, description="times the base's width: small models need about 2 to match full precision"
    )

    @property
    def label(self) -> str:
        """For instance `b158`, `b158-scratch-x2`, `median-a32`."""
        parts = ["b158" if self.scale == "mean" else "median"]
        parts += ["scratch"] if self.init_from == "scratch" else []
        parts += [f"x{self.widen}"] if self.widen > 1 else []
        parts += ["norm"] if self.norm else []
        return "-".join(parts + ([] if self.activation_bits else ["a32"]))

    @property
    def from_scratch(self) -> bool:
        """Whether training starts from random weights."""
        return self.init_from == "scratch"

    @model_validator(mode="after")
    def _only_new_models_are_wider(self) -> Self:
        training_method.refuse_wider_base(self.widen, from_scratch=self.from_scratch)
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Quantizers


def matrix_scale(weight_OI: Tensor, rule: str) -> Tensor:
    """Return g [1], float32."""
    size_OI = weight_OI.detach().float().abs()
    return (size_OI.mean() if rule == "mean" else size_OI.median()).clamp(min=_EPSILON).reshape(1)


def codes(weight_OI: Tensor, scale: Tensor) -> Tensor:
    """Return -1, 0 or 1 for every weight [O, I], as floats."""
    return (weight_OI.detach().float() / scale).round().clamp(-1, 1)


def quantize_weight(weight_OI: Tensor, rule: str) -> Tensor:
    """Return the three-level weight [O, I]; the gradient passes unchanged."""
    scale = matrix_scale(weight_OI, rule)
    exact_OI = (codes(weight_OI, scale) * scale).to(weight_OI.dtype)
    return exact_OI + (weight_OI - weight_OI.detach())


def quantize_input(x: Tensor) -> Tensor:
    """Return x [..., I] on 255 levels for each token; the gradient passes unchanged."""
    detached = x.detach().float()
    factor = 127.0 / detached.abs().amax(-1, keepdim=True).clamp(min=_EPSILON)
    exact = ((detached * factor).round().clamp(-128, 127) / factor).to(x.dtype)
    return exact + (x - x.detach())


def prepared_input(x: Tensor, config: Config) -> Tensor:
    """Return what a layer multiplies: x normalised and quantized as the configuration says."""
    if config.norm:
        x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + _NORM_EPSILON).to(x.dtype)
    return quantize_input(x) if config.activation_bits else x


@dataclass(frozen=True)
class BitPacked(level_codes.LevelPacked):
    """Three levels, and an input that is quantized before it is multiplied."""

    config: Config = field(default_factory=Config)

    def inputs(self, x: Tensor) -> Tensor:
        """Return x [..., I] as the product reads it."""
        return prepared_input(x, self.config)


# ---------------------------------------------------------------------------------------------------------------------
# The method


def pack(weight_OI: Tensor, config: Config) -> Packed:
    """Return one matrix as stored."""
    scale = matrix_scale(weight_OI, config.scale)
    return BitPacked((codes(weight_OI, scale) + 1).to(torch.uint8), scale, 3, config)


class Method(TrainingMethod[Config], config=Config):
    """BitNet b1.58."""

    bits: ClassVar[str] = "1.6"
    paper: ClassVar[str] = (
        "Ma et al. 2024, The Era of 1-bit LLMs (arXiv 2402.17764); Nielsen et al. 2024, Reloaded (arXiv 2407.09527)"
    )

    def shape(self, base: Shape, config: Config) -> Shape:
        """Return the base's shape, as much wider as asked for; the size of a head stays."""
        return training_method.widened(base, config.widen)

    def transform(self, model: nn.Module, names: Sequence[str], config: Config) -> None:
        """Put BitNet's layer in the place of every named layer."""
        import functools

        from models.compression.modules.quantized import FunctionalLinear

        inputs = functools.partial(prepared_input, config=config)
        weight = functools.partial(quantize_weight, rule=config.scale)
        linear = training_method.linear_layers(model, names)
        training_method.put_layers(
            model, {name: FunctionalLinear(module, inputs, weight) for name, module in linear.items()}
        )

    def finish(self, model: nn.Module, config: Config) -> dict[str, Packed]:
        """Return the trained layers as stored."""
        from models.compression.modules.quantized import FunctionalLinear

        found = {n: m for n, m in model.named_modules() if isinstance(m, FunctionalLinear)}
        return {name: pack(module.weight, config) for name, module in found.items()}

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        plain = level_codes.LevelPacked.restore(tensors, 3)
        return BitPacked(plain.digits_OI, plain.step, 3, config)

    def baselines(self, config: Config) -> dict[str, dict[str, Any]]:
        """Return full precision with equal steps from the same start and no training; a wider one has both widths."""
        baselines = {"fp32": config.full_precision(init_from=config.init_from)}
        if config.widen > 1:
            baselines["fp32, as wide"] = config.full_precision(init_from=config.init_from, widen=config.widen)
        return baselines if config.from_scratch else baselines | {"untrained": config.changed("bitnet", steps=0)}
