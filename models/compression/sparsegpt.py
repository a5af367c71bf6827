"""SparseGPT: a mask by OBS salience, chosen as the columns are reached, and survivors that absorb what was removed.

Beside the paper: with integer storage there are two passes. The first chooses the mask and compensates exactly; the
row grids are fitted to its survivors; the second visits the original weight again with mask and grids fixed, so each
column's rounding error is compensated together with its pruning error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from models.compression.base import Calibration, Packed, Statistics, WeightMethod
from models.compression.formats import int_grid, sparse
from models.compression.solvers import obs
from models.compression.wanda import scores
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


class Config(sparse.PruneConfig):
    """Parameters of SparseGPT."""

    damp: float = Field(
        0.01, gt=0.0, le=10.0, description="ridge on the second moment, as a share of its mean diagonal"
    )
    block: int = Field(128, ge=1, le=65536, description="columns among which an unstructured mask is chosen at a time")


class _Masker:
    """Chooses the mask of each block from its current weights, and zeroes what the mask drops."""

    def __init__(self, mask_OI: Tensor, config: Config) -> None:
        self.mask_OI = mask_OI
        self._config = config

    def begin(self, first: int, weight_OB: Tensor, inverse_B: Tensor) -> None:
        """Keep the weights of the block whose removal would cost most: w^2 / U_ii^2."""
        chosen_OB = block_mask((weight_OB / inverse_B).square(), self._config)
        self.mask_OI[:, first : first + weight_OB.shape[1]] = chosen_OB

    def __call__(self, position: int, weight_O: Tensor) -> Tensor:
        return weight_O * self.mask_OI[:, position]


class _MaskedRounder:
    """Rounds survivors to a fixed row grid under a fixed mask."""

    def __init__(self, mask_OI: Tensor, fixed: int_grid.Grid) -> None:
        self._mask_OI, self._grid = mask_OI, fixed

    def begin(self, first: int, weight_OB: Tensor, inverse_B: Tensor) -> None:
        """Need nothing: mask and grids are fixed."""

    def __call__(self, position: int, weight_O: Tensor) -> Tensor:
        rounded_O = self._grid.decode(self._grid.encode(weight_O[:, None, None])).flatten()
        return rounded_O.to(weight_O.dtype) * self._mask_OI[:, position]


def block_mask(score_OB: Tensor, config: Config) -> Tensor:
    """Return the mask of one block of columns: the highest scores over all of its rows, or of each run of a row."""
    if config.run:
        return sparse.keep_pattern(score_OB, *config.run)
    return sparse.keep_share(score_OB.reshape(1, -1), config.sparsity).view(score_OB.shape)


def _whole_mask(score_OI: Tensor, config: Config) -> Tensor:
    if config.run:
        return block_mask(score_OI, config)
    return torch.cat([block_mask(part_OB, config) for part_OB in score_OI.split(config.block, dim=1)], dim=1)


def _check(weight_OI: Tensor, config: Config) -> None:
    """Refuse rows that a pattern does not fit before any work is done."""
    if config.run:
        sparse.keep_pattern(weight_OI, *config.run)


class Method(WeightMethod[Config], config=Config):
    """SparseGPT."""

    bits: ClassVar[str] = "4-32, share of zeros or n:m"
    calibration: ClassVar[Calibration] = "hessian"
    paper: ClassVar[str] = "Frantar and Alistarh 2023, SparseGPT (arXiv 2301.00774)"

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
        """Return the pruned and compensated weight.

        Raises:
            ValueError: no usable second moment, or rows that the pattern does not fit.
        """
        hessian_II = statistics.second_moment("sparsegpt", weight_OI.shape[1])
        _check(weight_OI, config)
        damped_II = obs.damped(hessian_II, statistics.tokens, config.damp)
        masker = _Masker(torch.ones_like(weight_OI, dtype=torch.bool), config)
        stored_OI = obs.compensate(weight_OI, damped_II, masker, block=config.run[1] if config.run else config.block)
        if config.value_bits > 8:
            return sparse.pack(stored_OI, masker.mask_OI, config)
        fixed = sparse.fit((stored_OI * masker.mask_OI).float(), config)
        stored_OI = obs.compensate(weight_OI, damped_II, _MaskedRounder(masker.mask_OI, fixed))
        return sparse.pack(stored_OI, masker.mask_OI, config, fixed)

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        return sparse.restore(tensors, config)

    def baselines(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:
        """Return masks by Wanda's score, by magnitude and at random, each of the same size, nothing compensated."""
        hessian_II = statistics.second_moment("sparsegpt", weight_OI.shape[1])
        baselines = {
            "wanda": scores(weight_OI, hessian_II),
            "magnitude": weight_OI.abs(),
            "random": sparse.random_score(weight_OI),
        }
        return {name: sparse.pack(weight_OI, _whole_mask(score, config), config) for name, score in baselines.items()}
