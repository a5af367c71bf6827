"""Helpers for optimizer tests: named tensors with given gradients, and two simulated ranks in one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

Named = dict[str, nn.Parameter]


@pytest.fixture
def named() -> Callable[..., Named]:
    """Return a function that makes parameters of given shapes with normal values, equal for equal seeds."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> Named:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
            for name, shape in shapes.items()
        }

    return make


@pytest.fixture
def fill() -> Callable[[Named, int], dict[str, Tensor]]:
    """Return a function that sets gradients for a step number and returns them."""

    def set_gradients(parameters: Named, step: int, scale: float = 1.0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = (noise * scale).to(parameter.dtype)
        return {name: parameter.grad.clone() for name, parameter in parameters.items()}

    return set_gradients
