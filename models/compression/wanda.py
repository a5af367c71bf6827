"""Wanda: prune by |weight| times the norm of its input, row by row; no weight is updated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from models.compression.base import Calibration, Packed, Statistics, WeightMethod
from models.compression.formats import sparse

if TYPE_CHECKING:
    from torch import Tensor


class Config(sparse.PruneConfig):
    """Parameters of Wanda."""


def scores(weight_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """Return |W_ij| * ||X_j||, float64."""
    return weight_OI.double().abs() * hessian_II.diagonal().double().clamp(min=0).sqrt()


class Method(WeightMethod[Config], config=Config):
    """Wanda."""

    bits: ClassVar[str] = "4-32, share of zeros or n:m"
    calibration: ClassVar[Calibration] = "hessian"
    paper: ClassVar[str] = (
        "Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models (arXiv 2306.11695)"
    )

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
        """Return the pruned weight.

        Raises:
            ValueError: no usable second moment, or rows that the pattern does not fit.
        """
        hessian_II = statistics.second_moment("wanda", weight_OI.shape[1])
        return sparse.pack(weight_OI, sparse.keep(scores(weight_OI, hessian_II), config), config)

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        return sparse.restore(tensors, config)

    def baselines(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:  # noqa: ARG002
        """Return pruning by magnitude, and at random, with the same share of zeros in the same storage."""
        baselines = {"magnitude": weight_OI.abs(), "random": sparse.random_score(weight_OI)}
        return {name: sparse.pack(weight_OI, sparse.keep(score, config), config) for name, score in baselines.items()}
