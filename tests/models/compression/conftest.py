"""Weights and inputs like those of a trained layer: correlated inputs, a few large ones, uneven rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.compression.base import Statistics

Layer = tuple[Tensor, Tensor, Statistics]


@pytest.fixture
def layer() -> Callable[..., Layer]:
    """Return a factory of (weight [O, I], inputs [N, I], their statistics)."""

    def build(rows: int = 24, columns: int = 64, tokens: int = 400, seed: int = 0) -> Layer:
        generator = torch.Generator().manual_seed(seed)
        mixing_II = torch.randn(columns, columns, generator=generator) / columns**0.5
        scale_I = torch.exp(0.7 * torch.randn(columns, generator=generator))
        inputs_NI = torch.randn(tokens, columns, generator=generator) @ (mixing_II + torch.eye(columns)) * scale_I
        weight_OI = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
        return weight_OI, inputs_NI, Statistics(inputs_NI.double().T @ inputs_NI.double(), tokens)

    return build
