"""Load any model folder of this project, also the compressed ones that no public loader reads."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from pipelines.compression import folder, skeleton


def load_model(path: Path) -> PreTrainedModel:
    """Return the model in `path`, ready for inference on the CPU.

    A public folder is loaded by transformers alone; a private one (weights in `packed*.safetensors`) is built from its
    configuration and filled with the dequantized weights.

    Raises:
        IntegrityError: weights are missing or damaged.
    """
    if not is_private(path):
        return skeleton.architecture(AutoConfig.from_pretrained(path), path).from_pretrained(path).eval()
    model = skeleton.build(path)
    reader = folder.WeightReader(path)
    held = set(reader.names())
    dtype = model.config.dtype or torch.float32
    for name, _ in list(model.named_parameters()):
        if name in held:
            skeleton.set_parameter(model, name, reader.dense(name).to(dtype))
    model.tie_weights()
    return model


def is_private(path: Path) -> bool:
    """Return whether a folder needs this loader."""
    return (path / folder.RECORD).is_file() and any(path.glob(f"{folder.PRIVATE_STEM}*.safetensors"))
