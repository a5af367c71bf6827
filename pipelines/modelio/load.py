"""Load any model folder of this project, also the compressed ones that no public loader reads."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from models.compression.modules import packed_linear
from pipelines.core.errors import IntegrityError
from pipelines.modelio import folder, kv_cache_file, meta_init


def load_model(path: Path) -> PreTrainedModel:
    """Return the model in `path`, ready for inference on the CPU; with its quantized cache, if it has one.

    Raises:
        IntegrityError: weights are missing or damaged.
        NumericError: a weight is not finite.
    """
    model = load_weights(path)
    return kv_cache_file.attach(model, path) if kv_cache_file.exists(path) else model


def load_weights(path: Path) -> PreTrainedModel:
    """Return the model in `path` without a quantized cache.

    A public folder is loaded by transformers alone; a private one (weights in `packed*.safetensors`) is built from its
    configuration and filled with the dequantized weights, and layers that round their inputs do so.

    Raises:
        IntegrityError: weights are missing or damaged.
        NumericError: a weight is not finite.
    """
    if not _is_packed(path):
        loaded = meta_init.architecture(AutoConfig.from_pretrained(path), path).from_pretrained(path).eval()
        refuse_not_finite(loaded, path)
        meta_init.linearize(loaded)
        return loaded
    model = meta_init.build(path)
    reader = folder.WeightReader(path)
    stored = set(reader.names())
    dtype = model.config.dtype or torch.float32
    for name, _ in list(model.named_parameters()):
        if name in stored:
            tensor = meta_init.as_in_memory(model, name, reader.dense(name))
            meta_init.set_parameter(model, name, tensor.to(dtype))
    for name in reader.rounding():
        packed_linear.put(model, name, reader.packed(name))
    model.tie_weights()
    if empty := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise IntegrityError(f"{path} holds no tensor {empty[0]!r}", hint="delete the artifact and run again")
    return model


def refuse_not_finite(model: PreTrainedModel, path: Path) -> None:
    """Refuse a model that transformers loaded with a weight that is not finite.

    Raises:
        NumericError: naming the weight.
    """
    for name, parameter in model.named_parameters():
        folder.refuse_not_finite(name, parameter, path)


def is_private(path: Path) -> bool:
    """Return whether a folder needs this loader."""
    return kv_cache_file.exists(path) or _is_packed(path)


def _is_packed(path: Path) -> bool:
    return (path / folder.RECORD).is_file() and any(path.glob(f"{folder.PACKED_STEM}*.safetensors"))
