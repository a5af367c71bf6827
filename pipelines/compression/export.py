"""The folder that a child is stored in: compressed-tensors where its layout fits, our own record where none does.

How plain transformers 5.23 reads compressed-tensors decides three things here:

* It unpacks at the first forward pass, in the dtype of the model, except with `dequantize`, which unpacks while loading
  in the dtype of the scales. ModernBERT and packed embeddings load only with `dequantize` (its weight initialisation
  touches `weight`, which a packed module lacks), so there the scales are stored as float32 and every layer shares one
  scheme, because `dequantize` applies the first one to all.
* Zero points of packed groups load only with `dequantize`, for the same reason.
* Its sparse formats are gone, so a bitmask is stored under our own record and read by `pipelines.compression.load`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pipelines.compression import folder

LAYOUT_PUBLIC = "compressed-tensors pack-quantized"
LAYOUT_PRIVATE = "ingot packed"
_UNPACKED_WHILE_LOADING = frozenset({"modernbert"})


def loads_dense(model: PreTrainedModel, config: Mapping[str, Any], *, embeddings: bool) -> bool:
    """Return whether plain transformers has to unpack this child while loading it."""
    return model.config.model_type in _UNPACKED_WHILE_LOADING or embeddings or config.get("symmetric") is False


def quantization_config(model: PreTrainedModel, packed: Mapping[str, dict[str, Any]], *, dense: bool) -> dict[str, Any]:
    """Return the `quantization_config` of `config.json`.

    Args:
        model: the parent, for the names of its modules.
        packed: module name -> scheme of every packed module.
        dense: unpack while loading.
    """
    groups: dict[str, list[str]] = {}
    for name, scheme in packed.items():
        groups.setdefault(json.dumps(scheme, sort_keys=True), []).append(name)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    kinds = sorted({"Embedding" if isinstance(modules[n], nn.Embedding) else "Linear" for n in packed})
    ignored = [n for n, m in modules.items() if n not in packed and type(m).__name__ in kinds]
    value: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            f"group_{number}": _group(json.loads(scheme), kinds if len(groups) == 1 else names)
            for number, (scheme, names) in enumerate(sorted(groups.items()))
        },
    }
    return value | ({"dequantize": True} if dense else {})


def finish(source: Path, target: Path, record: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> None:
    """Write everything beside the weights: config with its quantization, record, tokenizer.

    Args:
        source: the parent's model folder.
        target: the child's model folder.
        record: module name -> {"method", "config"}.
        quantization: `quantization_config`, None for the private layout.
    """
    folder.copy_companions(source, target)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    folder.write_json(target / "config.json", config)
    folder.write_json(target / folder.RECORD, {"format": folder.RECORD_FORMAT, "layers": dict(record)})


def _group(scheme: dict[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    return {
        "targets": list(targets),
        "weights": scheme,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
