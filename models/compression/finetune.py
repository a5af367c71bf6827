"""Continued training without compression: the baseline of every method that trains.

Briefly trained models get better with any further step, so what a method gains is what it gains beyond this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from models.architectures.config import Shape
from models.compression import training_method
from models.compression.training_method import TrainedConfig, TrainingMethod

if TYPE_CHECKING:
    from torch import nn


class Config(TrainedConfig):
    """Parameters of continued training."""

    init_from: Literal["base", "scratch"] = Field(
        "base", description="go on with the base, or train a model of its shape from random weights"
    )

    keep_zeros: bool = Field(False, description="weights that are zero in the base stay zero: for a pruned base")
    widen: int = Field(1, ge=1, le=8, description="times the base's width, where training starts from random weights")

    @property
    def label(self) -> str:
        """For instance `200`: the steps; `200-scratch-x2`."""
        wider = f"-x{self.widen}" if self.widen > 1 else ""
        return f"{self.steps}" + ("-scratch" if self.from_scratch else "") + wider

    @property
    def from_scratch(self) -> bool:
        """Whether training starts from random weights."""
        return self.init_from == "scratch"

    @model_validator(mode="after")
    def _zeros_are_those_of_the_base(self) -> Self:
        training_method.refuse_zeros_of_nothing(keep_zeros=self.keep_zeros, from_scratch=self.from_scratch)
        return self

    @model_validator(mode="after")
    def _only_new_models_are_wider(self) -> Self:
        training_method.refuse_wider_base(self.widen, from_scratch=self.from_scratch)
        return self


class Method(TrainingMethod[Config], config=Config):
    """Continued training."""

    bits: ClassVar[str] = "32"
    paper: ClassVar[str] = "none; a baseline"
    not_informative: ClassVar[str] = "it compresses nothing: it is what other methods are compared with"

    def shape(self, base: Shape, config: Config) -> Shape:
        """Return the base's shape, as much wider as asked for."""
        return training_method.widened(base, config.widen)

    def transform(self, model: nn.Module, names: Sequence[str], config: Config) -> None:
        """Leave the layers as they are, but for zeros that are to stay."""
        if config.keep_zeros:
            training_method.keep_zeros(model, names)
