"""A shape survives the way through `config.json`, and models that are not ours are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig, Shape, count_parameters
from models.architectures.describe import shape_of

IDS = {"vocab_size": 31, "max_positions": 12, "bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
SHAPES: list[dict[str, Any]] = [
    {"width": 16, "layers": 2, "heads": 2, "ffn_width": 24},
    {"width": 32, "layers": 1, "heads": 4, "kv_heads": 2, "ffn_width": 40, "tie_embeddings": False, "init_std": 0.06},
    {"width": 16, "layers": 3, "heads": 2, "ffn_width": 24, "rope_theta": 500.0, "norm_eps": 1e-6},
    {"width": 32, "layers": 2, "heads": 2, "head_width": 8, "ffn_width": 40},
    {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 10, "ffn_width": 40},
    {"family": "encoder", "width": 16, "layers": 5, "heads": 2, "ffn_width": 24, "global_every": 2, "local_window": 8},
    {"family": "encoder", "width": 16, "layers": 2, "heads": 2, "ffn_width": 24, "rope_theta": 500.0},
]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 2, "head_width": 7}, "head_width = 7 must be even"),
        ({"heads": 3, "head_width": 8}, "heads = 3 does not divide width = 32"),
        ({"heads": 2, "head_width": 8, "family": "encoder"}, "the encoder's is width / heads; valid: none"),
    ],
)
def test_heads_of_a_size_of_their_own_still_fit(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape.model_validate({"width": 32} | sizes)


@pytest.mark.parametrize("sizes", SHAPES[3:5])
def test_parameters_are_counted_with_the_size_of_a_head(sizes: dict[str, Any]) -> None:
    architecture = ArchitectureConfig.model_validate({**sizes, **IDS})
    model = build(architecture, seed=0)
    assert count_parameters(architecture) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("sizes", SHAPES)
def test_the_shape_that_was_saved_is_read_back(sizes: dict[str, Any], tmp_path: Path) -> None:
    architecture = ArchitectureConfig.model_validate({**sizes, **IDS})
    build(architecture, seed=0).save_pretrained(tmp_path)
    found = shape_of(json.loads((tmp_path / "config.json").read_text()))
    expected = Shape.model_validate(architecture.model_dump(include=set(Shape.model_fields)))
    if expected.family == "encoder" and expected.global_every > expected.layers:
        # Which of the layers that it lacks would attend globally, a shallow encoder does not say.
        expected = expected.model_copy(update={"global_every": found.global_every})
        assert found.global_every >= expected.layers
    assert found == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"intermediate_size": [24, 20]}, "its layers differ in size"),
        ({"head_dim": 5}, "head_width = 5 must be even"),
    ],
)
def test_what_cannot_be_trained_here_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    build(ArchitectureConfig.model_validate({**SHAPES[0], **IDS}), seed=0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        shape_of(config | changes)
