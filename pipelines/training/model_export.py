"""The finished model as a plain Hugging Face folder, whatever the sharding it was trained under."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed
from transformers import GenerationConfig

from models.architectures.config import ArchitectureConfig
from models.optim.sharded_optimizer import FragmentOptimizer
from pipelines.core import artifact
from pipelines.core.errors import IntegrityError
from pipelines.modelio.folder import refuse_not_finite
from pipelines.training.distributed import Ranks

_PREFIX = "model."
"""What `LossModule` puts before the names of the model that it wraps."""
_CLASSES = {"decoder": "LlamaForCausalLM", "encoder": "ModernBertForMaskedLM"}


def gather_weights(optimizer: FragmentOptimizer, ranks: Ranks) -> dict[str, Tensor]:
    """Return all master weights by name, float32 on the CPU; every rank must call it, only rank 0 gets tensors.

    Fragments are disjoint, so summing their bit patterns over ranks puts them together without touching a bit.

    Raises:
        IntegrityError: the fragments of all ranks do not make up every tensor.
    """
    layout = optimizer.layout
    mine = list(layout.fragments) if layout.reduce is not None or ranks.rank == 0 else []
    held = dict.fromkeys(layout.shapes, 0)
    for fragment in mine:
        held[fragment.name] += fragment.numel
    totals = ranks.summed(list(held.values()))
    weights = {}
    for (name, shape), total in zip(layout.shapes.items(), totals, strict=True):
        size = torch.Size(shape).numel()
        if total != size:
            raise IntegrityError(f"{name}: the ranks hold {int(total)} of {size} elements")
        bits = torch.zeros(size, dtype=torch.int32, device=ranks.device)
        for fragment in mine:
            if fragment.name == name:
                bits.narrow(0, fragment.start, fragment.numel).copy_(fragment.master.view(torch.int32))
        if ranks.world > 1:
            distributed.reduce(bits, dst=0)
        if ranks.rank == 0:
            weights[name.removeprefix(_PREFIX)] = bits.cpu().view(torch.float32).view(shape)
    return weights


def write_model(folder: Path, architecture: ArchitectureConfig, weights: dict[str, Tensor], precision: str) -> None:
    """Write configuration and weights so that plain transformers loads them.

    Args:
        folder: created; what is there is replaced.
        architecture: what was trained.
        weights: name -> float32 tensor; a tied matrix is there once, under the embedding's name.
        precision: bf16 weights are stored as bfloat16, fp32 ones as they are.

    Raises:
        NumericError: a weight is not finite, as trained or as stored.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layout = importlib.import_module(f"models.architectures.{architecture.family}").layout(architecture)
    layout.architectures = [_CLASSES[architecture.family]]
    layout.dtype = dtype
    layout.save_pretrained(folder)
    if architecture.family == "decoder":
        GenerationConfig.from_model_config(layout).save_pretrained(folder)
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    for name, tensor in stored.items():
        refuse_not_finite(name, tensor, folder)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def copy_tokenizer(prepare: Path, folder: Path) -> None:
    """Put the tokenizer of the prepare artifact beside the weights.

    Raises:
        IntegrityError: the tokenizer folder is missing.
    """
    source = prepare / "tokenizer"
    if not source.is_dir():
        raise IntegrityError(f"{source} is missing: the prepare artifact holds no tokenizer")
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, folder / path.name)


def write_json(path: Path, value: object) -> None:
    """Write a small JSON file in one step; floats keep every digit."""
    artifact.write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
