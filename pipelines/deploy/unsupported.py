"""What a format cannot say of a child: rounded inputs of its layers, and its coded cache.

Other runtimes' files hold weights. A child that also rounds the inputs of its layers, or codes its attention cache,
computes something else there than what was measured, at another speed and from another memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from models.compression.base import Packed
from pipelines.core.errors import ConfigError
from pipelines.modelio import kv_cache_file
from pipelines.modelio.folder import WeightReader


def of(model: Path, says: Callable[[Packed], bool] = lambda _: False) -> list[str]:
    """Return what a file of this model's weights leaves out, one phrase each; empty where it is the whole model.

    Args:
        model: model folder, in any layout of this project.
        says: whether the format rounds the inputs of a packed layer as that layer does.
    """
    reader = WeightReader(model)
    rounding = [packed for packed in map(reader.packed, reader.modules()) if packed.rounds_inputs and not says(packed)]
    found = [f"activations are not quantized there: {_layers(rounding)}"] if rounding else []
    return found + (["its attention cache is not coded there"] if kv_cache_file.held(model) else [])


def refuse(found: list[str], file_format: str, *, allowed: bool) -> str:
    """Return what to add to the sentence about the export, beginning with a semicolon; empty where nothing is lost.

    Raises:
        ConfigError: something is left out and nobody said that it may be.
    """
    if not found:
        return ""
    if not allowed:
        raise ConfigError(
            f"{file_format} holds weights alone, so the file would not compute what was measured: {'; '.join(found)}",
            hint="`--weights-only` writes it all the same; `--format hf` keeps everything",
        )
    return "; weights only: " + "; ".join(found)


def _layers(rounding: list[Packed]) -> str:
    kinds = {_describe(packed) for packed in rounding}
    return f"{len(rounding)} layers of this child round their inputs ({', '.join(sorted(kinds))})"


def _describe(packed: Packed) -> str:
    scheme = packed.input_scheme()
    if scheme is None:
        return "with columns apart"
    scale = "a scale for each token" if scheme["dynamic"] else "a fixed scale"
    return f"{scheme['type']}{scheme['num_bits']}, {scale}"
