"""Continued training without compression: the baseline of every method that trains.

Briefly trained models get better with any further step, so what a method gains is what it gains beyond this.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from models.compression.training_method import TrainedConfig, TrainingMethod


class Config(TrainedConfig):
    """Parameters of continued training."""

    init_from: Literal["base", "scratch"] = Field(
        "base", description="go on with the base, or train a model of its shape from random weights"
    )

    @property
    def label(self) -> str:
        """For instance `200`: the steps."""
        return f"{self.steps}" + ("-scratch" if self.from_scratch else "")

    @property
    def from_scratch(self) -> bool:
        """Whether training starts from random weights."""
        return self.init_from == "scratch"


class Method(TrainingMethod[Config], config=Config):
    """Continued training."""

    bits: ClassVar[str] = "32"
    paper: ClassVar[str] = "none; a baseline"
    not_informative: ClassVar[str] = "it compresses nothing: it is what other methods are compared with"
