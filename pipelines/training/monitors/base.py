"""What every monitor supplies.

A module of this package defines one class `Monitor(base.Monitor)`; its file name is its key in `pretrain.monitors`,
whose presence switches it on. A monitor is a function of the losses that it was shown: its state is JSON, saved in
checkpoints, and a monitor that is given its state back goes on as if nothing had happened.

The loss of a step must be read from the device before the next one may begin, so a run with a monitor waits for the
device once a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pydantic import Field

from pipelines.core.settings import Settings


class MonitorConfig(Settings):
    """The settings that every monitor has."""

    max_rollbacks: int = Field(3, ge=1, description="Times to go back before giving up.")


class Monitor(ABC):
    """Watches the losses of a run.

    Args:
        settings: an instance of the class's `Config`.
    """

    Config: ClassVar[type[MonitorConfig]] = MonitorConfig
    """Schema of `pretrain.monitors.<name>`."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def refuses(self, loss: float) -> str | None:
        """Return why training must go back from a step with this loss (nats per target), or None and remember it.

        Called once for each step that was not skipped, with the same loss on every rank.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what it remembers, as JSON values."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Remember what `state` returned; an empty mapping is the beginning of a run."""
