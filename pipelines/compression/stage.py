"""The compress stage: one variant of a base model, made by the driver of its method's kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from models.compression import registry
from models.compression.base import Kind
from pipelines.compression import budget_search, kv_cache, post_training, qat, structured_pruning
from pipelines.compression.config import CompressConfig
from pipelines.compression.report import CompressionReport
from pipelines.compression.run import CompressionRun
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.core.stage import StageContext, Summary
from pipelines.modelio.folder import KV_CACHE_FILE

DRIVERS: dict[Kind, Callable[[CompressionRun], CompressionReport]] = {
    "weight": post_training.compress,
    "structure": structured_pruning.compress,
    "kv_cache": kv_cache.compress,
    "training": qat.compress,
    "search": budget_search.compress,
}


def run(config: CompressConfig, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> Summary:
    """Compress `inputs["model"]` with the method that the configuration names, shown text of `inputs["prepare"]`.

    Writes `model/` (a model folder) and, when that is complete, `compression.json`; see `report.CompressionReport`.

    Raises:
        ConfigError: the method does not fit the model.
        NumericError: something met numbers that are not finite.
    """
    if (inputs["model"].path / "model" / KV_CACHE_FILE).is_file():
        raise ConfigError(
            f"{config.method}: its base quantizes its cache already, and the tables fit no other weights",
            hint="quantize the cache last: start from the base of that variant",
        )
    opened = CompressionRun.open(config, inputs, out_dir, context, run)
    report = DRIVERS[registry.get(config.method).kind](opened)
    report.write(out_dir)
    return report.summary()
