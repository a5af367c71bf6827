"""The folder that a variant is stored in: compressed-tensors where its layout fits, our own record where none does.

How plain transformers 5.23 reads compressed-tensors decides three things here:

* It unpacks at the first forward pass, in the dtype of the model, except with `dequantize`, which unpacks while loading
  in the dtype of the scales. ModernBERT and packed embeddings load only with `dequantize` (its weight initialisation
  touches `weight`, which a packed module lacks), so there the scales are stored as float32 and every layer shares one
  scheme, because `dequantize` applies the first one to all.
* Zero points of packed groups load only with `dequantize`, for the same reason.
* Its sparse formats are gone, so a bitmask is stored under our own record and read by `pipelines.modelio.load`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from models.compression.base import Packed
from pipelines.core.artifact import read_json
from pipelines.modelio import folder

LAYOUT_DENSE = "safetensors"
LAYOUT_PUBLIC = "compressed-tensors"
LAYOUT_PRIVATE = "ingot packed"
_UNPACKED_WHILE_LOADING = frozenset({"modernbert"})


def loads_with(layout: str) -> Literal["transformers", "pipelines.modelio.load"]:
    """Return the module that loads a layout."""
    return "pipelines.modelio.load" if layout == LAYOUT_PRIVATE else "transformers"


def loads_dense(model: PreTrainedModel, config: Mapping[str, Any], *, embeddings: bool) -> bool:
    """Return whether plain transformers has to unpack this variant while loading it."""
    return model.config.model_type in _UNPACKED_WHILE_LOADING or embeddings or config.get("symmetric") is False


def quantization_config(model: PreTrainedModel, packed: Mapping[str, dict[str, Any]], *, dense: bool) -> dict[str, Any]:
    """Return the `quantization_config` of `config.json`.

    Args:
        model: the base model, for the names of its modules.
        packed: module name -> config group of every packed module, from `group`.
        dense: unpack while loading.
    """
    groups: dict[str, list[str]] = {}
    for name, scheme in packed.items():
        groups.setdefault(json.dumps(scheme, sort_keys=True), []).append(name)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    kinds = sorted({"Embedding" if isinstance(modules[n], nn.Embedding) else "Linear" for n in packed})
    ignored = [n for n, m in modules.items() if n not in packed and type(m).__name__ in kinds]
    formats = sorted({scheme["format"] for scheme in packed.values()})
    value: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            f"group_{number}": json.loads(scheme) | {"targets": kinds if len(groups) == 1 else names}
            for number, (scheme, names) in enumerate(sorted(groups.items()))
        },
    }
    return value | ({"dequantize": True} if dense else {})


def group(packed: Packed, *, dense: bool) -> dict[str, Any] | None:
    """Return the config group of one packed module, but for its targets; None where no public reader computes it.

    Unpacking while loading forgets how inputs are rounded, so those layers need our loader there.
    """
    weights, inputs = packed.scheme(), packed.input_scheme()
    if weights is None or (dense and packed.rounds_inputs):
        return None
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": packed.storage}


def finish(source: Path, target: Path, record: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> None:
    """Write everything beside the weights: config with its quantization, record, tokenizer.

    Args:
        source: the base model's folder.
        target: the variant's model folder.
        record: module name -> {"method", "config"}.
        quantization: `quantization_config`, None for the private layout.
    """
    folder.copy_companions(source, target)
    config = read_json(source / "config.json")
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    folder.write_json(target / "config.json", config)
    folder.write_json(target / folder.RECORD, {"format": folder.RECORD_FORMAT, "layers": dict(record)})
