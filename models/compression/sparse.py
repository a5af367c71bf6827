"""Pruning masks, and sparse storage: one bit a weight for the mask, and the values that survive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.compression.base import Packed
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


@dataclass(frozen=True)
class SparsePacked(Packed):
    """A bitmask and the surviving values in row order. No maintained library reads this layout: see `restore`."""

    mask_OI: Tensor
    """bool."""
    values: Tensor
    """[survivors] float32, bfloat16, or int8 codes."""
    scale_O: Tensor | None = None
    """bfloat16; only with int8 codes."""

    def dequantize(self) -> Tensor:
        """Return the weight [O, I], float32, zero where pruned."""
        dense_OI = torch.zeros(self.mask_OI.shape, dtype=torch.float32)
        dense_OI[self.mask_OI] = self.values.to(torch.float32)
        return dense_OI if self.scale_O is None else dense_OI * self.scale_O.to(torch.float32).unsqueeze(1)

    def tensors(self) -> dict[str, Tensor]:
        """Return bitmask (uint8 [O, ceil(I/8)], lowest bit first), values, shape and, for codes, scales."""
        stored = {
            "weight_bitmask": pack_bits(self.mask_OI),
            "weight_values": self.values.contiguous(),
            "weight_shape": torch.tensor(self.mask_OI.shape, dtype=torch.int64),
        }
        return stored if self.scale_O is None else stored | {"weight_scale": self.scale_O}


def restore(tensors: Mapping[str, Tensor]) -> SparsePacked:
    """Rebuild a sparse weight from its stored tensors."""
    columns = int(tensors["weight_shape"][1])
    mask_OI = unpack_bits(tensors["weight_bitmask"], columns)
    return SparsePacked(mask_OI, tensors["weight_values"], tensors.get("weight_scale"))


def keep_share(score_OI: Tensor, sparsity: float) -> Tensor:
    """Return the mask that drops the lowest `sparsity` share of each row; ties fall to the left."""
    dropped = round(sparsity * score_OI.shape[1])
    order_OI = torch.argsort(score_OI, dim=1, stable=True)
    return torch.ones_like(score_OI, dtype=torch.bool).scatter_(1, order_OI[:, :dropped], value=False)


def keep_pattern(score_OI: Tensor, kept: int, of: int) -> Tensor:
    """Return the mask that keeps the `kept` highest scores in every `of` consecutive weights of a row.

    Raises:
        ValueError: a row is not a whole number of such runs.
    """
    if score_OI.shape[1] % of:
        raise ValueError(f"a {kept}:{of} pattern does not fit rows of {score_OI.shape[1]} weights")
    return keep_share(score_OI.reshape(-1, of), 1 - kept / of).view(score_OI.shape)


def pack_bits(mask_OI: Tensor) -> Tensor:
    """Return uint8 [O, ceil(I/8)], lowest bit first."""
    padded = torch.nn.functional.pad(mask_OI.to(torch.uint8), (0, -mask_OI.shape[1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8)
    return (padded.unflatten(1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bits_OB: Tensor, columns: int) -> Tensor:
    """Return the bool mask [O, columns]."""
    places = torch.arange(8, dtype=torch.uint8)
    return ((bits_OB.unsqueeze(-1) >> places) & 1).flatten(1)[:, :columns].bool()
