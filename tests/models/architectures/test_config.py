"""Shapes: what is refused, what presets are, and that counted sizes are those of built models."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from models.architectures.build import build
from models.architectures.config import (
    DEMO_VOCABULARY,
    PRESETS,
    ArchitectureConfig,
    Family,
    Shape,
    count_embedding,
    count_parameters,
    flops_per_token,
    preset,
)
from models.architectures.transformers_internals import without_initialization

TOKENS = {"vocab_size": 53, "max_positions": 16, "bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
SMALL = {"width": 24, "layers": 4, "heads": 4, "ffn_width": 40, "local_window": 4}


def architecture(**values: Any) -> ArchitectureConfig:
    return ArchitectureConfig(**{**SMALL, **TOKENS, **values})


@pytest.mark.parametrize(
    "values",
    [
        {"family": "decoder"},
        {"family": "decoder", "tie_embeddings": False},
        {"family": "decoder", "kv_heads": 2},
        {"family": "decoder", "kv_heads": 1, "layers": 1},
        {"family": "encoder"},
        {"family": "encoder", "tie_embeddings": False, "layers": 1},
    ],
)
def test_the_formula_counts_the_parameters_of_the_built_model(values: dict[str, Any]) -> None:
    config = architecture(**values)
    model = build(config, seed=0)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_the_formula_counts_the_parameters_of_every_preset(family: Family, name: str) -> None:
    config = ArchitectureConfig(**preset(family, name).model_dump(), **{**TOKENS, "vocab_size": 32_000})
    with without_initialization(), init_empty_weights(include_buffers=False):
        model = importlib.import_module(f"models.architectures.{family}").construct(config)
    model.tie_weights()
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_a_preset_has_the_size_that_its_name_says_at_the_vocabulary_of_the_demo(family: Family, name: str) -> None:
    unit = {"m": 1e6, "b": 1e9}[name[-1]]
    config = ArchitectureConfig(**preset(family, name).model_dump(), **{**TOKENS, "vocab_size": DEMO_VOCABULARY})
    assert count_parameters(config) == pytest.approx(float(name[:-1]) * unit, rel=0.1)


def test_the_smallest_preset_is_half_a_million_and_the_largest_seven_billion() -> None:
    assert next(iter(PRESETS)) == "0.5m"
    assert list(PRESETS)[-1] == "7b"


def test_the_embedding_counts_twice_when_it_is_not_tied() -> None:
    assert count_embedding(architecture(tie_embeddings=False)) == 2 * count_embedding(architecture()) == 2 * 53 * 24


def test_flops_of_the_decoder_are_those_that_torch_counts_with_half_the_attention() -> None:
    config = architecture(layers=2)
    counted = counted_flops(config, tokens=16)
    masked_half = 6 * config.layers * config.width * 16
    assert flops_per_token(config, 16) == pytest.approx(counted / 16 - masked_half, rel=1e-9)


def test_flops_of_an_encoder_that_attends_globally_are_those_that_torch_counts() -> None:
    config = architecture(family="encoder", layers=2, global_every=1)
    head = 6 * config.width * config.width
    assert flops_per_token(config, 16) == pytest.approx(counted_flops(config, tokens=16) / 16 - head, rel=1e-9)


def test_local_attention_makes_an_encoder_cheaper() -> None:
    everywhere, local = (architecture(family="encoder", global_every=n) for n in (1, 2))
    saved = 12 * 24 * 2 * (16 - 4)  # two of four layers see 4 tokens instead of 16
    assert flops_per_token(everywhere, 16) - flops_per_token(local, 16) == saved


def counted_flops(config: ArchitectureConfig, tokens: int) -> int:
    """Forward and backward operations of one sequence, by torch's own counter, gains of norms left out."""
    model = build(config, seed=0)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(tokens)[None] % config.vocab_size).logits.sum().backward()
    gains = sum(2 * config.width for _ in range(config.layers)) * 6 * tokens
    return counter.get_total_flops() + gains


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 30, "heads": 4}, r"heads = 4 does not fit width = 30.*valid heads: \[1, 3, 5, 15\]"),
        ({"width": 12, "heads": 4}, "whole, even number"),
        ({"kv_heads": 3}, r"kv_heads = 3 does not divide heads = 4; valid: \[1, 2, 4\]"),
        ({"family": "encoder", "kv_heads": 2}, "the encoder has one key head per head"),
        ({"layers": 0}, "greater than or equal to 1"),
        ({"hidden": 12}, "Extra inputs are not permitted"),
        ({"init_std": float("nan")}, "finite"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused_with_value_and_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Shape(**{**SMALL, **values})


def test_a_special_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"mask_id = 53 is outside the vocabulary 0\.\.52"):
        architecture(mask_id=53)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown preset '3m'; known: 0\.5m, 1m, 4m"):
        preset("decoder", "3m")


def test_overrides_replace_single_values_of_a_preset() -> None:
    shape = preset("decoder", "4m", {"layers": 6})
    assert shape.layers == 6
    assert shape.width == preset("decoder", "4m").width


def test_grouped_key_heads_of_a_preset_are_left_out_for_the_encoder() -> None:
    assert preset("decoder", "1b").key_heads == 8
    assert preset("encoder", "1b").key_heads == 32


def test_shapes_are_known_without_torch() -> None:
    code = "import sys, models.architectures.config, models.architectures.naming; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
