"""What carries stage requests out. The name of a module here is the value of `compute.executor`.

Each module has one class `Executor`, made from the `compute` section of the recipe. An executor knows requests, never
stages; to add one, add a file here and a test beside that of `local`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Protocol

from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import ConfigError
from pipelines.core.request import StageRequest
from pipelines.core.stage import Progress


class Executor(Protocol):
    """Carries requests out, up to `compute.parallel` at a time, each in a thread that waits for it."""

    def execute(self, request: StageRequest, report: Callable[[Progress], None]) -> Artifact:
        """Return the artifact of a request, passing on what the stage reports.

        Raises:
            IngotError: of the class that the stage raised, wherever it ran.
        """

    def stop(self) -> None:
        """Have everything at work save and end, and return when it has; what is asked later is refused."""


def names() -> list[str]:
    """Return the executors there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(compute: ComputeConfig) -> Executor:
    """Return the executor of a run.

    Raises:
        ConfigError: there is no such executor.
    """
    if compute.executor not in names():
        raise ConfigError(f"compute.executor is {compute.executor!r}; there is {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{compute.executor}")
    executor: Executor = module.Executor(compute)
    return executor
