"""Continued training without compression: the neutral arm of every method that trains.

Briefly trained models get better with any further step, so what a method gains is what it gains beyond this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from models.compression import training_method
from models.compression.base import Calibration, Kind, Packed
from models.compression.training_method import TrainedConfig

if TYPE_CHECKING:
    from torch import nn

kind: Kind = "training"
bits = "32"
calibration: Calibration = "none"
paper = "control arm; none"
not_informative = "it compresses nothing: it is what other methods are compared with"


class Config(TrainedConfig):
    """Parameters of continued training."""

    start: Literal["parent", "scratch"] = Field(
        "parent", description="go on with the parent, or train a model of its shape from random weights"
    )

    @property
    def label(self) -> str:
        """For instance `200`: the steps."""
        return f"{self.steps}" + ("-scratch" if self.from_scratch else "")

    @property
    def from_scratch(self) -> bool:
        """Whether training starts from random weights."""
        return self.start == "scratch"


shape = training_method.same_shape
source = training_method.same_layer
loss = training_method.language_loss


def transform(model: nn.Module, names: Sequence[str], config: Config) -> None:
    """Leave the model as it is."""


def finish(model: nn.Module, config: Config) -> dict[str, Packed]:  # noqa: ARG001 - the contract
    """Pack nothing."""
    return {}


def controls(config: Config) -> dict[str, dict[str, Any]]:  # noqa: ARG001 - the contract
    """Return no arm."""
    return {}
