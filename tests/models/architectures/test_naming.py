"""What the names of parameters say."""

from __future__ import annotations

import pytest

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from models.architectures.naming import group_of, layer_of
from models.optim import lisa


@pytest.mark.parametrize(
    ("name", "layer", "group"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 0, "layer.0"),
        ("model.model.layers.11.mlp.down_proj.weight", 11, "layer.11"),
        ("layers.3.attn.Wqkv.weight", 3, "layer.3"),
        ("model.embed_tokens.weight", None, "embedding"),
        ("model.embeddings.tok_embeddings.weight", None, "embedding"),
        ("model.embeddings.norm.weight", None, "norm"),
        ("model.norm.weight", None, "norm"),
        ("model.final_norm.weight", None, "norm"),
        ("lm_head.weight", None, "head"),
        ("head.dense.weight", None, "head"),
        ("decoder.bias", None, "head"),
        ("sublayers.weight", None, "norm"),
    ],
)
def test_a_name_tells_layer_and_group(name: str, layer: int | None, group: str) -> None:
    assert layer_of(name) == layer
    assert group_of(name) == group


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_every_parameter_of_a_model_has_its_place_and_lisa_sees_the_same_layers(family: str) -> None:
    config = ArchitectureConfig.model_validate(
        {"family": family, "width": 16, "layers": 3, "heads": 2, "ffn_width": 16, "tie_embeddings": False}
        | {"vocab_size": 11, "max_positions": 8, "bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    )
    names = [name for name, _ in build(config, seed=0).named_parameters()]
    assert {layer_of(name) for name in names} == {None, 0, 1, 2}
    assert {group_of(name) for name in names} == {"layer.0", "layer.1", "layer.2", "embedding", "head", "norm"}
    assert [layer_of(name) for name in names] == [lisa.layer_of(name) for name in names]
