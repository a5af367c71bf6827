"""The interface of methods that cut attention groups and feed-forward neurons out of every layer."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, TypeVar

from models.compression.base import Calibration, CompressionMethod, Kind
from models.compression.solvers import structured
from models.compression.solvers.structured import MaskedModel, Structure, StructureConfig

S = TypeVar("S", bound=StructureConfig)


class StructureMethod(CompressionMethod[S]):
    """A method that decides which units stay."""

    kind: ClassVar[Kind] = "structure"
    bits: ClassVar[str] = "as the base; fewer heads and neurons"
    calibration: ClassVar[Calibration] = "inputs"

    @abstractmethod
    def select(self, model: MaskedModel, config: S) -> Structure:
        """Return what stays; masks are on the CPU."""

    def baselines(self, model: MaskedModel, config: StructureConfig) -> dict[str, Structure]:
        """Return structures that lose as much: the largest weights, and the best and the median of random ones."""
        best, median = structured.random_structures(model, config)
        return {"magnitude": structured.by_magnitude(model, config), "random best": best, "random median": median}
