"""From a transformers configuration back to the shape that it was built from: the inverse of the families' `layout`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.architectures.config import Shape

_SIZES = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn_width": "intermediate_size",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Return the shape that a `config.json` describes.

    Args:
        config: its content.

    Raises:
        ValueError: it is of neither family, or has layers of unequal size.
    """
    kind = config.get("model_type")
    if kind not in {"llama", "modernbert"}:
        raise ValueError(f"model_type is {kind!r}; training continues with 'llama' and 'modernbert' models only")
    if isinstance(config["intermediate_size"], list):
        raise ValueError("its layers differ in size; training needs layers of one size")
    values = {name: config[key] for name, key in _SIZES.items()}
    own = _decoder(config) if kind == "llama" else _encoder(config)
    return Shape.model_validate(values | own)


def _decoder(config: Mapping[str, Any]) -> dict[str, Any]:
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "family": "decoder",
        "head_width": None if size * heads == config["hidden_size"] else size,
        "kv_heads": None if keys == heads else keys,
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_parameters"]["rope_theta"],
    }


def _encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    kinds = config["layer_types"]
    # The first layer attends globally; the next one that does so again tells the period.
    again = [place for place, kind in enumerate(kinds) if kind == "full_attention" and place]
    return {
        "family": "encoder",
        "norm_eps": config["norm_eps"],
        "local_window": config["local_attention"],
        "global_every": again[0] if again else max(len(kinds), 1),
        "rope_theta": config["rope_parameters"]["full_attention"]["rope_theta"],
    }
