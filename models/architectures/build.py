"""Build a model with weights that depend on the seed alone.

Every tensor is drawn from a private generator keyed by the seed and its name, so the weights are the same on every
rank and in every process, whatever was drawn from torch's global generator before, and a layer that is added changes
no other tensor.
"""

from __future__ import annotations

import hashlib
import importlib
import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.architectures.config import ArchitectureConfig
from models.architectures.transformers_internals import without_initialization

_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "Wo.weight")
"""Matrices that write into the residual stream."""


def initial_tensor(name: str, shape: torch.Size, *, seed: int, std: float, layers: int) -> Tensor:
    """Return the initial value of one parameter, float32.

    One-dimensional weights are norm gains and start at one, biases at zero, matrices at N(0, std^2); matrices that
    write into the residual stream are scaled by 1 / sqrt(2 * layers), so that its variance does not grow with depth
    (GPT-2).

    Args:
        name: name of the parameter in the model.
        shape: its shape.
        seed: seed of the run.
        std: standard deviation of matrices.
        layers: depth of the model.
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    if name.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * layers)
    return torch.empty(shape).normal_(0.0, std, generator=_generator(seed, name))


def build(config: ArchitectureConfig, *, seed: int) -> PreTrainedModel:
    """Return the model of `config` in float32 on the CPU, initialised from `seed`."""
    family = importlib.import_module(f"models.architectures.{config.family}")
    with without_initialization():
        model: PreTrainedModel = family.construct(config)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_tensor(name, parameter.shape, seed=seed, std=config.init_std, layers=config.layers))
    return model


def _generator(seed: int, name: str) -> torch.Generator:
    key = hashlib.sha256(f"weights/{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
