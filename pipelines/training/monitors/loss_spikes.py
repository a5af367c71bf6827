"""A loss far above the median of the recent ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from pipelines.training.monitors import base


class LossSpikesConfig(base.MonitorConfig):
    """What counts as a spike."""

    factor: float = Field(
        gt=1.0, examples=[3.0], description="A loss above this many times the recent median is a spike."
    )
    window: int = Field(20, ge=2, le=10000, description="Steps that the median is taken over.")


def is_spike(loss: float, recent: Sequence[float], *, factor: float, window: int) -> bool:
    """Tell whether a loss is more than `factor` times the median of the last `window` ones; never before there are."""
    return len(recent) >= window and loss > factor * statistics.median(recent[-window:])


def extended(recent: Sequence[float], loss: float, window: int) -> list[float]:
    """Return the last `window` finite losses."""
    return [*recent, loss][-window:] if math.isfinite(loss) else list(recent)


class Monitor(base.Monitor):
    """Refuses a step whose loss is a spike."""

    Config = LossSpikesConfig

    def __init__(self, settings: LossSpikesConfig) -> None:
        super().__init__(settings)
        self._recent: list[float] = []

    def refuses(self, loss: float) -> str | None:
        """Compare with the median of the window; a loss that is no spike joins it."""
        factor, window = self.settings.factor, self.settings.window
        if is_spike(loss, self._recent, factor=factor, window=window):
            median = statistics.median(self._recent)
            return f"the loss is {loss:.4g}, more than {factor:g} times the median before it, {median:.4g}"
        self._recent = extended(self._recent, loss, window)
        return None

    def state(self) -> dict[str, Any]:
        """Return the losses of the window."""
        return {"recent": list(self._recent)}

    def load(self, state: dict[str, Any]) -> None:
        """Put the losses of the window back."""
        self._recent = list(state.get("recent", []))
