"""Random search over structures: draw some, keep the one with the lowest calibration loss.

The baseline that every structured method has to beat: with as many trials as the method has measurements it is a
serious opponent, and a method that does not beat its median chose no better than chance.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from models.compression.solvers import structured
from models.compression.solvers.structured import MaskedModel, Structure, StructureConfig
from models.compression.structure_method import StructureMethod


class Config(StructureConfig):
    """Parameters of random search."""

    trials: int = Field(16, ge=1, le=10_000, description="random structures drawn; the best becomes the variant")


class Method(StructureMethod[Config], config=Config):
    """Random search."""

    paper: ClassVar[str] = (
        "Farahani 2024, Random Search as a Baseline for Sparse Neural Network Architecture Search (arXiv 2403.08265)"
    )

    def select(self, model: MaskedModel, config: Config) -> Structure:
        """Return the best of the random structures."""
        return structured.random_structures(model, config)[0]
