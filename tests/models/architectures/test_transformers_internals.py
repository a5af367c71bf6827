"""What is assumed of transformers holds for the installed version, and is told where it does not."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from models.architectures import transformers_internals as internals

CHECKOUT = Path(__file__).resolve().parents[3]
BORROWED = ("transformers", "compressed-tensors", "lm-eval", "torchao")
"""Dependencies of which a private or fast-moving part is used."""


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x * self.weight * scale


class Doubled(Base):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return 2 * super().forward(x, scale)


class Renamed(Base):
    def forward(self, states: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(states, scale)


class Initialised(Base):
    def __init__(self) -> None:
        super().__init__()
        self.more = 1


def test_a_module_becomes_another_and_keeps_its_parameters() -> None:
    module = Base()
    weight = module.weight
    internals.become(module, Doubled, parameters=("weight",), overrides=("forward",))
    assert module.weight is weight
    assert torch.equal(module(torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize(
    ("subclass", "parameters", "overrides", "message"),
    [
        (Doubled, ("weight", "bias"), (), "Base has no bias"),
        (Doubled, (), ("prepare",), "Base has no method prepare, so it would never be called"),
        (Renamed, (), ("forward",), r"Base\.forward has no arguments states"),
    ],
)
def test_an_assumption_that_does_not_hold_is_told_with_the_version(
    subclass: Any, parameters: Any, overrides: Any, message: str
) -> None:
    module = Base()
    with pytest.raises(NotImplementedError, match=rf"transformers [\d.]+: {message}; this code was written for 5\.23"):
        internals.become(module, subclass, parameters, overrides)
    assert type(module) is Base


@pytest.mark.parametrize("subclass", [Initialised, LlamaAttention])
def test_only_a_subclass_by_methods_alone_is_taken(subclass: Any) -> None:
    with pytest.raises(TypeError, match="does not extend Base by methods alone"):
        internals.become(Base(), subclass, (), ())


def test_attention_is_the_one_that_the_configuration_chose() -> None:
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16)
    config._attn_implementation = "eager"
    assert internals.attention_function(config, eager_attention_forward) is eager_attention_forward
    config._attn_implementation = "sdpa"
    assert internals.attention_function(config, eager_attention_forward) is not eager_attention_forward
    with pytest.raises(NotImplementedError, match="object has no `_attn_implementation`"):
        internals.attention_function(object(), eager_attention_forward)


@pytest.mark.parametrize("name", BORROWED)
def test_what_is_borrowed_from_has_an_upper_bound(name: str) -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    listed = [
        *project["dependencies"],
        *(text for group in project["optional-dependencies"].values() for text in group),
    ]
    bounds = [Requirement(text).specifier for text in listed if Requirement(text).name == name]
    assert bounds
    assert all(any(bound.operator in {"<", "=="} for bound in specifiers) for specifiers in bounds)
