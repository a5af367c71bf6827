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


_DEFAULTS = {"initializer_range"}
"""Keys that say nothing of what trained weights compute, and that a file may lack."""
_FIXED = {
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0},
    "modernbert": {"hidden_activation": "gelu", "attention_bias": False, "mlp_bias": False, "norm_bias": False},
}
"""Model type -> entries that the layout here has no choice in."""


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Return the shape that a `config.json` describes.

    Args:
        config: its content.

    Raises:
        ValueError: it is of neither family, has layers of unequal size, or computes what the layouts here do not.
    """
    kind = config.get("model_type")
    if kind not in {"llama", "modernbert"}:
        raise ValueError(f"model_type is {kind!r}; training continues with 'llama' and 'modernbert' models only")
    if other := beyond_layout(config):
        raise ValueError(f"{', '.join(other)}; the layout that is trained here has no such thing")
    if isinstance(config["intermediate_size"], list):
        raise ValueError("its layers differ in size; training needs layers of one size")
    config = {"tie_word_embeddings": kind == "modernbert"} | dict(config)  # the defaults of transformers
    values = {name: config[key] for name, key in _SIZES.items() if key in config or key not in _DEFAULTS}
    own = _decoder(config) if kind == "llama" else _encoder(config)
    return Shape.model_validate(values | own)


def beyond_layout(config: Mapping[str, Any]) -> list[str]:
    """Return what a `config.json` of one of the two families asks for that the layout here has not, an entry each."""
    fixed = _FIXED[config["model_type"]]
    return [f"{name} is {config[name]!r}" for name, ours in fixed.items() if config.get(name, ours) != ours] + _scaled(
        config
    )


def _scaled(config: Mapping[str, Any]) -> list[str]:
    """Return rotary positions that are stretched, which older files write as `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = [each for each in rope.values() if isinstance(each, Mapping)] or [rope]
    types = {str(each.get("rope_type", each.get("type", "default"))) for each in kinds}
    return [f"rope_type is {kind!r}" for kind in sorted(types - {"default"})]


def _theta(config: Mapping[str, Any], *places: str) -> float:
    rope = config.get("rope_parameters") or {}
    for place in places:
        rope = rope.get(place) or {}
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)


def _decoder(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    keys = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "family": "decoder",
        "head_width": None if size * heads == config["hidden_size"] else size,
        "kv_heads": None if keys == heads else keys,
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": _theta(config),
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
        "rope_theta": _theta(config, "full_attention"),
    }
