"""Pruning by magnitude: the smallest weights of each row (or run of a pattern n:m) go; no input is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.compression.base import Calibration, Kind, Packed, Statistics
from models.compression.formats import sparse

if TYPE_CHECKING:
    from torch import Tensor

kind: Kind = "weight"
bits = "4-32, share of zeros or n:m"
calibration: Calibration = "none"
paper = "Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks (arXiv 1506.02626)"
not_informative = ""
restore = sparse.restore


class Config(sparse.PruneConfig):
    """Parameters of pruning by magnitude."""


def compress(weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:  # noqa: ARG001 - the contract
    """Return the pruned weight.

    Raises:
        ValueError: rows that the pattern does not fit.
    """
    return sparse.pack(weight_OI, sparse.keep(weight_OI.abs(), config), config)


def nulls(weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:  # noqa: ARG001
    """Return a random mask with the same share of zeros in the same storage."""
    return {"random": sparse.pack(weight_OI, sparse.keep(sparse.random_score(weight_OI), config), config)}
