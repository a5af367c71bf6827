"""The third step of the 8-bit workflow: training with the rounding in place (QAT), for models that `int8` harms.

Weights are rounded to 8 bits a channel, whose range is the largest magnitude of the row at every step; inputs to 8 bits
a token. Gradients pass both roundings straight through: nothing is clipped, so nothing is cut off. Biases, norms and
embeddings train too.

Beside the paper: it keeps one range a tensor for inputs, from calibration before the training. Here each token has its
own, which needs none and rounds finer. Stored as compressed-tensors `int-quantized` with dynamic inputs, which plain
transformers and vLLM read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from models.compression import training_method
from models.compression.base import Packed
from models.compression.formats import int_grid, quantized_input
from models.compression.formats.int8_linear import Int8Packed
from models.compression.training_method import TrainedConfig, TrainingMethod
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy_module("torch")

_GRID = int_grid.GridConfig(bits=8, clip="max")


class Config(TrainedConfig):
    """Parameters of training at 8 bits."""

    @property
    def label(self) -> str:
        """For instance `200`: the steps."""
        return f"{self.steps}"


def pack(weight_OI: Tensor) -> quantized_input.InputPacked:
    """Return one matrix as stored."""
    real_OI = weight_OI.detach().float()
    fixed = int_grid.fit(real_OI, _GRID)
    codes_OI = int_grid.nearest(real_OI, fixed).codes_OI
    return quantized_input.InputPacked(Int8Packed(codes_OI, fixed.scale_OG.to(torch.bfloat16)))


def quantize_weight(weight_OI: Tensor) -> Tensor:
    """Return the weight as stored [O, I]; its gradient is that of the weight."""
    return straight_through(weight_OI, pack(weight_OI).dequantize().to(weight_OI.dtype))


def quantize_input(x: Tensor) -> Tensor:
    """Return x [..., I] rounded to 8 bits a token; its gradient is that of x."""
    real = x.detach()
    return straight_through(x, quantized_input.round_to(real, quantized_input.token_scale(real, 8), 8))


def straight_through(real: Tensor, rounded: Tensor) -> Tensor:
    """Return exactly `rounded`, with the gradient of `real`."""
    return rounded + (real - real.detach())


class Method(TrainingMethod[Config], config=Config):
    """Training at 8 bits."""

    bits: ClassVar[str] = "8, inputs 8"
    paper: ClassVar[str] = "Wu et al. 2020, Integer Quantization for Deep Learning Inference (arXiv 2004.09602)"

    def transform(self, model: nn.Module, names: Sequence[str], config: Config) -> None:  # noqa: ARG002
        """Round weights and inputs of every named layer while it trains."""
        from models.compression.modules.quantized import FunctionalLinear

        linear = training_method.linear_layers(model, names)
        training_method.put_layers(
            model, {name: FunctionalLinear(layer, quantize_input, quantize_weight) for name, layer in linear.items()}
        )

    def finish(self, model: nn.Module, config: Config) -> dict[str, Packed]:  # noqa: ARG002
        """Return the trained layers as stored."""
        from models.compression.modules.quantized import FunctionalLinear

        found = {name: module for name, module in model.named_modules() if isinstance(module, FunctionalLinear)}
        return {name: pack(module.weight) for name, module in found.items()}

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:  # noqa: ARG002
        """Rebuild a packed weight from its stored tensors."""
        return quantized_input.InputPacked(Int8Packed(tensors["weight"], tensors["weight_scale"]))

    def baselines(self, config: Config) -> dict[str, dict[str, Any]]:
        """Return no training, the calibrated workflow without training, and equal steps in full precision."""
        return {
            "untrained": config.changed("int8_tune", steps=0),
            "int8": {"method": "int8"},
            "continued fp32": config.full_precision(),
        }
