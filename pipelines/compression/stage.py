"""The compress stage: one child of a model, made by the driver of its method's kind."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from models.compression import registry
from pipelines.compression.config import CompressConfig
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.core.stage import StageContext, StageFunction, Summary
from pipelines.modelio.folder import KV_CACHE_FILE

DRIVERS = {
    "search": "pipelines.compression.budget_search",
    "structure": "pipelines.compression.structured_pruning",
    "kv_cache": "pipelines.compression.kv_cache",
    "training": "pipelines.compression.qat",
    "weight": "pipelines.compression.post_training",
}
"""Kind of a method -> module whose `run` makes a variant."""


def run(config: CompressConfig, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> Summary:
    """Compress `inputs["model"]` with the method that the configuration names.

    Every driver writes `model/` (a model folder) and `compression.json` with at least `method`, `parameters`, `layout`,
    `loads_with`, `totals` (bytes of child and parent) and `errors`.

    Raises:
        ConfigError: the method does not fit the model.
        NumericError: something met numbers that are not finite.
    """
    if (inputs["model"].path / "model" / KV_CACHE_FILE).is_file():
        raise ConfigError(
            f"{config.method}: its parent codes its cache already, and the tables fit no other weights",
            hint="compress the cache last: start from the parent of that child",
        )
    driver: StageFunction = importlib.import_module(DRIVERS[registry.get(config.method).kind]).run
    return driver(config, inputs, out_dir, context)
