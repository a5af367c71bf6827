"""The file `kv_cache.safetensors` of a model folder: how the attention cache of every layer is quantized.

Tensors `layers.N.keys.*` and `layers.N.values.*` (levels [2^bits], edges [2^bits - 1], `range` [2, channels] where
channels have fixed ranges, `threshold` [1] where rows are too short to count outliers in), float32; metadata `coding`
(JSON: `method` and `config`). The weights beside it are the base model's, unchanged: plain transformers loads them and
keeps an ordinary cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from models.compression import registry
from models.compression.base import MethodConfig
from models.compression.modules import quantized_cache
from models.compression.modules.quantized_cache import Tables
from pipelines.core.errors import IntegrityError
from pipelines.modelio.folder import KV_CACHE_FILE, refuse_not_finite

_SIDES = ("keys", "values")


def exists(folder: Path) -> bool:
    """Return whether a model folder says how its cache is quantized."""
    return (folder / KV_CACHE_FILE).is_file()


def write(folder: Path, tables: Sequence[Tables], method: str, config: MethodConfig) -> None:
    """Write the tables of all layers.

    Raises:
        NumericError: a table holds a value that is not finite.
    """
    stored = {
        f"layers.{number}.{side}.{name}": tensor.cpu().contiguous()
        for number, table in enumerate(tables)
        for side in _SIDES
        for name, tensor in getattr(table, side).tensors().items()
    }
    for name, tensor in stored.items():
        refuse_not_finite(name, tensor, folder / KV_CACHE_FILE)
    # One entry: safetensors writes several in an order that differs from process to process.
    coding = json.dumps({"method": method, "config": config.model_dump(mode="json")}, sort_keys=True)
    save_file(stored, folder / KV_CACHE_FILE, metadata={"coding": coding})


def read(folder: Path, layers: int) -> list[Tables]:
    """Return the tables of all layers.

    Raises:
        IntegrityError: the file is damaged, or not for a model of so many layers.
        NumericError: a table holds a value that is not finite.
    """
    try:
        with safe_open(folder / KV_CACHE_FILE, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is no mapping
    except SafetensorError as error:
        raise IntegrityError(f"{folder / KV_CACHE_FILE} is damaged: {error}", hint="`ingot verify`") from error
    for name, tensor in tensors.items():
        refuse_not_finite(name, tensor, folder / KV_CACHE_FILE)
    stored_layers = len({name.split(".")[1] for name in tensors})
    if stored_layers != layers:
        raise IntegrityError(
            f"{folder / KV_CACHE_FILE} is for {stored_layers} layers; the model beside it has {layers}"
        )
    if "coding" not in metadata:
        raise IntegrityError(f"{folder / KV_CACHE_FILE} does not say how it was quantized", hint="`ingot verify`")
    coding = json.loads(metadata["coding"])
    method = registry.kv_cache(coding["method"])
    config = method.Config.model_validate(coding["config"])
    tables = []
    for number in range(layers):
        keys, values = (
            method.restore({n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(prefix)}, config)
            for prefix in (f"layers.{number}.{side}." for side in _SIDES)
        )
        tables.append(Tables(keys, values, config.exact_tokens))
    return tables


def attach(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Make a model use the cache that its folder describes, in place."""
    return quantized_cache.attach(model, read(folder, model.config.num_hidden_layers))
