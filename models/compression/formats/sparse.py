"""What the pruning methods share: their parameters, masks, and the storage of what survives.

There are two layouts, because no maintained library still reads sparse checkpoints (compressed-tensors dropped its
sparse formats after 0.14):

    packed    codes of `value_bits` on an integer grid, zeros exact: loads in plain transformers, and its bytes come
              from the codes, not from the zeros
    bitmask   one bit a weight plus the survivors: the zeros save bytes, and our loader is needed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from models.compression.base import MethodConfig, Packed
from models.compression.formats import int_grid
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


class PruneConfig(MethodConfig):
    """Parameters of a pruning method."""

    pattern: Literal["unstructured", "2:4", "4:8"] = Field(
        "unstructured", description="free choice, or so many of so many consecutive weights"
    )
    sparsity: float = Field(0.5, gt=0.0, lt=1.0, description="share of zeros; a pattern n:m fixes it at 0.5")
    value_bits: Literal[4, 8, 16, 32] = Field(8, description="bits of a surviving weight")
    storage: Literal["packed", "bitmask"] = Field(
        "packed", description="packed: dense codes, loads anywhere; bitmask: mask and survivors, our loader"
    )

    @property
    def label(self) -> str:
        """For instance `2of4-int8`, `50-int8`, `50-fp32-bitmask`."""
        place = f"{self.sparsity * 100:g}" if self.pattern == "unstructured" else self.pattern.replace(":", "of")
        value = f"{'int' if self.value_bits <= 8 else 'fp'}{self.value_bits}"
        return f"{place.replace('.', 'p')}-{value}" + ("-bitmask" if self.storage == "bitmask" else "")

    @property
    def run(self) -> tuple[int, int] | None:
        """(kept, of) of a pattern n:m; None where the choice is free."""
        if self.pattern == "unstructured":
            return None
        kept, of = (int(part) for part in self.pattern.split(":"))
        return kept, of

    @model_validator(mode="after")
    def _storable(self) -> Self:
        valid = {"packed": (4, 8), "bitmask": (8, 16, 32)}[self.storage]
        if self.value_bits not in valid:
            raise ValueError(f"value_bits = {self.value_bits} cannot be stored as {self.storage!r}; valid: {valid}")
        if self.pattern != "unstructured" and self.sparsity != 0.5:
            raise ValueError(f"sparsity = {self.sparsity} contradicts the pattern {self.pattern}, which leaves 0.5")
        return self


@dataclass(frozen=True)
class SparsePacked(Packed):
    """A bitmask and the surviving values in row order; no maintained library reads it, `restore_bitmask` does."""

    mask_OI: Tensor
    """bool."""
    values: Tensor
    """[survivors] float32, bfloat16, or int8 codes."""
    scale_O: Tensor | None = None
    """bfloat16; only with int8 codes."""

    def dequantize(self) -> Tensor:
        """Return the weight [O, I], float32, zero where pruned."""
        dense_OI = torch.zeros(self.mask_OI.shape, dtype=torch.float32, device=self.values.device)
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


def pack(weight_OI: Tensor, mask_OI: Tensor, config: PruneConfig, fixed: int_grid.Grid | None = None) -> Packed:
    """Return the survivors of a mask in the storage that `config` asks for.

    Args:
        weight_OI: the weight; what the mask drops is ignored.
        mask_OI: bool, True for survivors.
        config: pattern and storage.
        fixed: row grid of the codes; None fits one to the survivors.
    """
    pruned_OI = (weight_OI * mask_OI).to(torch.float32)
    if config.value_bits > 8:
        dtype = torch.bfloat16 if config.value_bits == 16 else torch.float32
        return SparsePacked(mask_OI, pruned_OI[mask_OI].to(dtype))
    packed = int_grid.nearest(pruned_OI, fixed or fit(pruned_OI, config))
    if config.storage == "packed":
        return packed
    scale_O = packed.grid.scale_OG[:, 0].to(torch.bfloat16)
    return SparsePacked(mask_OI, packed.codes_OI[mask_OI], scale_O)


def fit(pruned_OI: Tensor, config: PruneConfig) -> int_grid.Grid:
    """Return the row grid of the survivors' codes."""
    return int_grid.fit(pruned_OI, int_grid.GridConfig(bits=config.value_bits))


def restore(tensors: Mapping[str, Tensor], config: PruneConfig) -> Packed:
    """Rebuild a pruned weight from its stored tensors."""
    return int_grid.restore(tensors, config.value_bits) if config.storage == "packed" else restore_bitmask(tensors)


def restore_bitmask(tensors: Mapping[str, Tensor]) -> SparsePacked:
    """Rebuild a weight in the bitmask storage."""
    columns = int(tensors["weight_shape"][1])
    mask_OI = unpack_bits(tensors["weight_bitmask"], columns)
    return SparsePacked(mask_OI, tensors["weight_values"], tensors.get("weight_scale"))


def keep(score_OI: Tensor, config: PruneConfig) -> Tensor:
    """Return the mask of the highest scores: of each row, or of each run of a pattern."""
    return keep_pattern(score_OI, *config.run) if config.run else keep_share(score_OI, config.sparsity)


def random_score(weight_OI: Tensor) -> Tensor:
    """Return scores [O, I] that know nothing, always the same ones for a shape."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(weight_OI.shape, generator=generator).to(weight_OI.device)


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
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask_OI.device)
    return (padded.unflatten(1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bits_OB: Tensor, columns: int) -> Tensor:
    """Return the bool mask [O, columns]."""
    places = torch.arange(8, dtype=torch.uint8, device=bits_OB.device)
    return ((bits_OB.unsqueeze(-1) >> places) & 1).flatten(1)[:, :columns].bool()
