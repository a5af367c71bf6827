"""A linear layer whose base is frozen in its quantized form, beside a low-rank adapter that trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.compression.lq_lora import AdaptedPacked


class AdaptedLinear(nn.Module):
    """y = Q x + L (R x), of which L and R train.

    Args:
        linear: the layer to take the place of.
        start: what its weight became; the base is kept as it is stored, and is no parameter.
    """

    base_OI: Tensor

    def __init__(self, linear: nn.Linear, start: AdaptedPacked) -> None:
        super().__init__()
        self.left_OR = nn.Parameter(start.left_OR.float())
        self.right_RI = nn.Parameter(start.right_RI.float())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.quantized = start.quantized
        self.register_buffer("base_OI", start.quantized.dequantize(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply base and adapter to x [..., I]."""
        narrow = functional.linear(x, self.right_RI)
        return functional.linear(x, self.base_OI, self.bias) + functional.linear(narrow, self.left_OR)

    def pack(self) -> AdaptedPacked:
        """Return the layer as stored: the base's own codes, the adapter in bfloat16."""
        left_OR, right_RI = (factor.detach().to(torch.bfloat16) for factor in (self.left_OR, self.right_RI))
        return AdaptedPacked(self.quantized.to(left_OR.device), left_OR.contiguous(), right_RI.contiguous())


def freeze(model: nn.Module) -> None:
    """Turn every parameter but the factors of adapters into a buffer, in place: an optimizer never sees them."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not (isinstance(module, AdaptedLinear) and name != "bias"):
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)
                setattr(module, _MARK, (*getattr(module, _MARK, ()), name))


def thaw(model: nn.Module) -> None:
    """Turn what `freeze` made buffers into parameters again; those that were one tensor are one again."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name in getattr(module, _MARK, ()):
            value = module.get_buffer(name)
            delattr(module, name)
            module.register_parameter(name, made.setdefault(value.data_ptr(), nn.Parameter(value)))


_MARK = "_frozen_parameters"
