"""Pruning by magnitude: the smallest weights of each row (or run of a pattern n:m) go; no input is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from models.compression.base import Calibration, Packed, Statistics, WeightMethod
from models.compression.formats import sparse

if TYPE_CHECKING:
    from torch import Tensor


class Config(sparse.PruneConfig):
    """Parameters of pruning by magnitude."""


class Method(WeightMethod[Config], config=Config):
    """Pruning by magnitude."""

    bits: ClassVar[str] = "4-32, share of zeros or n:m"
    calibration: ClassVar[Calibration] = "none"
    paper: ClassVar[str] = (
        "Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks (arXiv 1506.02626)"
    )

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:  # noqa: ARG002
        """Return the pruned weight.

        Raises:
            ValueError: rows that the pattern does not fit.
        """
        return sparse.pack(weight_OI, sparse.keep(weight_OI.abs(), config), config)

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        return sparse.restore(tensors, config)

    def baselines(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:  # noqa: ARG002
        """Return a random mask with the same share of zeros in the same storage."""
        return {"random": sparse.pack(weight_OI, sparse.keep(sparse.random_score(weight_OI), config), config)}
