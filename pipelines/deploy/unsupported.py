"""What a format cannot hold of a variant: rounded inputs of its layers, and its quantized cache.

Other runtimes' files hold weights. A variant that also rounds the inputs of its layers, or quantizes its attention
cache, computes something else there than what was measured, at another speed and from another memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from models.compression.base import Packed
from pipelines.core.errors import ConfigError
from pipelines.modelio import kv_cache_file
from pipelines.modelio.folder import WeightReader


def of(model: Path, rounds_same: Callable[[Packed], bool] = lambda _: False) -> list[str]:
    """Return what a file of this model's weights leaves out, one phrase each; empty where it is the whole model.

    Args:
        model: model folder, in any layout of this project.
        rounds_same: whether the format rounds the inputs of a packed layer as that layer does.
    """
    reader = WeightReader(model)
    rounding = [
        packed for packed in map(reader.packed, reader.modules()) if packed.rounds_inputs and not rounds_same(packed)
    ]
    missing = [f"activations are not quantized there: {_layers(rounding)}"] if rounding else []
    return missing + (["its attention cache is not quantized there"] if kv_cache_file.exists(model) else [])


def refuse(missing: list[str], file_format: str, *, allowed: bool) -> str:
    """Return what to add to the sentence about the export, beginning with a semicolon; empty where nothing is lost.

    Raises:
        ConfigError: something is left out and `allowed` is false.
    """
    if not missing:
        return ""
    if not allowed:
        raise ConfigError(
            f"{file_format} holds weights alone, so the file would not compute what was measured: {'; '.join(missing)}",
            hint="`--weights-only` writes it all the same; `--format hf` keeps everything",
        )
    return "; weights only: " + "; ".join(missing)


def _layers(rounding: list[Packed]) -> str:
    kinds = {_describe(packed) for packed in rounding}
    return f"{len(rounding)} layers of this variant round their inputs ({', '.join(sorted(kinds))})"


def _describe(packed: Packed) -> str:
    scheme = packed.input_scheme()
    if scheme is None:
        return "with columns apart"
    scale = "a scale for each token" if scheme["dynamic"] else "a fixed scale"
    return f"{scheme['type']}{scheme['num_bits']}, {scale}"
