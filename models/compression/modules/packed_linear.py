"""A linear layer that computes as its packed weight says: with rounded inputs, perhaps with rounded outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.compression.base import Packed


class PackedLinear(nn.Linear):
    """Computes what `Packed.forward` does, plus the bias, from a weight that is unpacked once.

    Args:
        packed: the stored weight; says how inputs are rounded.
        weight_OI: what it stands for, in the dtype to compute in.
        bias_O: bias of the layer.
    """

    def __init__(self, packed: Packed, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None, device="meta")
        self.packed = packed
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        if bias_O is not None:
            self.bias = nn.Parameter(bias_O, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        """Apply the layer to [..., I]."""
        return self.packed.product(input, self.weight, self.bias)


def put(model: nn.Module, name: str, packed: Packed) -> Tensor:
    """Let layer `name` of a model compute with a packed weight; returns the weight [O, I] that it stands for, float32.

    The layer is replaced by a `PackedLinear` where inputs are rounded; otherwise it takes the unpacked weight.
    """
    layer = model.get_submodule(name)
    dense_OI = packed.dequantize()
    old = layer.get_parameter("weight")
    weight_OI = dense_OI.to(old.device if not old.is_meta else torch.device("cpu"), old.dtype)
    if packed.rounds_inputs:
        bias = getattr(layer, "bias", None)
        model.set_submodule(name, PackedLinear(packed, weight_OI, None if bias is None else bias.detach()))
    else:
        layer.register_parameter("weight", nn.Parameter(weight_OI, requires_grad=False))
    return dense_OI
