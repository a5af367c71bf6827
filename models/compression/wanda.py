"""Wanda: prune by |weight| times the norm of its input, row by row; no weight is updated.

The survivors are then stored in one of two layouts, because no maintained library still reads sparse checkpoints
(compressed-tensors dropped its sparse formats after 0.14):

    packed    codes of `value_bits` on an integer grid, zeros exact: loads in plain transformers, and its bytes come
              from the codes, not from the zeros
    bitmask   one bit a weight plus the survivors: the zeros save bytes, and our loader is needed
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from models.compression import grid, sparse
from models.compression.base import Calibration, Kind, MethodConfig, Packed, Statistics
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

kind: Kind = "weight"
bits = "4-32, share of zeros or n:m"
calibration: Calibration = "hessian"
paper = "Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models (arXiv 2306.11695)"
not_informative = ""


class Config(MethodConfig):
    """Parameters of Wanda."""

    pattern: Literal["unstructured", "2:4", "4:8"] = Field(
        "unstructured", description="free choice within a row, or so many of so many consecutive weights"
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

    @model_validator(mode="after")
    def _storable(self) -> Self:
        valid = {"packed": (4, 8), "bitmask": (8, 16, 32)}[self.storage]
        if self.value_bits not in valid:
            raise ValueError(f"value_bits = {self.value_bits} cannot be stored as {self.storage!r}; valid: {valid}")
        if self.pattern != "unstructured" and self.sparsity != 0.5:
            raise ValueError(f"sparsity = {self.sparsity} contradicts the pattern {self.pattern}, which leaves 0.5")
        return self


def scores(weight_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """Return |W_ij| * ||X_j||, float64."""
    return weight_OI.double().abs() * hessian_II.diagonal().double().clamp(min=0).sqrt()


def compress(weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
    """Return the pruned weight.

    Raises:
        ValueError: no usable second moment, or rows that the pattern does not fit.
    """
    hessian_II = statistics.second_moment("wanda", weight_OI.shape[1])
    return _pack(weight_OI, _mask(scores(weight_OI, hessian_II), config), config)


def restore(tensors: Mapping[str, Tensor], config: Config) -> Packed:
    """Rebuild a packed weight from its stored tensors."""
    return grid.restore(tensors, config.value_bits) if config.storage == "packed" else sparse.restore(tensors)


def nulls(weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:  # noqa: ARG001
    """Return pruning by magnitude, and at random, with the same share of zeros in the same storage."""
    generator = torch.Generator().manual_seed(0)
    random_OI = torch.rand(weight_OI.shape, generator=generator).to(weight_OI.device)
    arms = {"magnitude": weight_OI.abs(), "random": random_OI}
    return {name: _pack(weight_OI, _mask(score, config), config) for name, score in arms.items()}


def _mask(score_OI: Tensor, config: Config) -> Tensor:
    if config.pattern == "unstructured":
        return sparse.keep_share(score_OI, config.sparsity)
    kept, of = (int(part) for part in config.pattern.split(":"))
    return sparse.keep_pattern(score_OI, kept, of)


def _pack(weight_OI: Tensor, mask_OI: Tensor, config: Config) -> Packed:
    pruned_OI = (weight_OI * mask_OI).to(torch.float32)
    if config.value_bits > 8:
        dtype = torch.bfloat16 if config.value_bits == 16 else torch.float32
        return sparse.SparsePacked(mask_OI, pruned_OI[mask_OI].to(dtype))
    packed = grid.nearest(pruned_OI, grid.fit(pruned_OI, grid.GridConfig(bits=config.value_bits)))
    if config.storage == "packed":
        return packed
    scale_O = packed.grid.scale_OG[:, 0].to(torch.bfloat16)
    return sparse.SparsePacked(mask_OI, packed.codes_OI[mask_OI], scale_O)
