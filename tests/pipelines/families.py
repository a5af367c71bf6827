"""A tiny random model of every family that a base may be of, from its transformers configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from pipelines.data import tokenizer
from pipelines.data.config import TokenizerTraining

VOCABULARY = 64
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_SCALED = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_ENCODER = {name: value for name, value in _DECODER.items() if name not in {"bos_token_id", "eos_token_id"}}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _DECODER | _GROUPED | {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", _DECODER | {"attention_bias": True, "mlp_bias": True, "rope_parameters": _SCALED}),
    "mistral": ("Mistral", _DECODER | _GROUPED | {"sliding_window": 8}),
    "qwen2": ("Qwen2", _DECODER | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8,
                                   "max_window_layers": 1}),
    "qwen3": ("Qwen3", _DECODER | _GROUPED | {"tie_word_embeddings": True}),
    "gemma": ("Gemma", _DECODER | {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3Text", _DECODER | _GROUPED | {"sliding_window": 8, "num_hidden_layers": 2,
                                                    "layer_types": ["sliding_attention", "full_attention"]}),
    "phi": ("Phi", _DECODER | {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", _DECODER | {"num_key_value_heads": 2}),
    "gpt2": ("GPT2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                      "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}),
    "gpt-neox": ("GPTNeoX", _DECODER | {"rotary_pct": 0.5}),
    "olmo2": ("Olmo2", _DECODER | {"num_key_value_heads": 2}),
    "smollm3": ("SmolLM3", _DECODER | {"num_key_value_heads": 2, "no_rope_layers": [1, 0]}),
}  # fmt: skip
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _ENCODER),
    "roberta": ("Roberta", _ENCODER | {"max_position_embeddings": 70}),
    "modernbert": ("ModernBert", _ENCODER | {"num_hidden_layers": 3, "local_attention": 16, "bos_token_id": 1,
                                             "global_attn_every_n_layers": 3, "eos_token_id": 2, "cls_token_id": 1,
                                             "sep_token_id": 2}),
    "distilbert": ("DistilBert", {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4,
                                  "max_position_embeddings": 64, "pad_token_id": 3}),
    "mpnet": ("MPNet", _ENCODER | {"max_position_embeddings": 70}),
}  # fmt: skip
FAMILIES = DECODERS | ENCODERS


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """Return the model of a family, in float32, with weights large enough that every part of it matters."""
    kind, settings = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, class_of(name))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def class_of(name: str) -> str:
    """Return the name of the transformers class of a family."""
    kind = FAMILIES[name][0]
    if name in ENCODERS:
        return f"{kind}ForMaskedLM"
    return {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}.get(kind, f"{kind}ForCausalLM")


def saved(name: str, folder: Path, seed: int = 0, change: Callable[[PreTrainedModel], None] | None = None) -> Path:
    """Save the model of a family, as its owner would, and return the folder."""
    model = build(name, seed)
    if change is not None:
        change(model)
    model.save_pretrained(folder)
    return folder


def complete(name: str, folder: Path, texts: Iterable[str], seed: int = 0, **changes: Any) -> Path:
    """Save a model of a family with a tokenizer that knows every byte, as one that its owner uses; return the folder.

    Args:
        name: of the family.
        folder: created.
        texts: what the tokenizer learns from.
        seed: of the weights.
        changes: over the settings of its configuration.
    """
    words = tokenizer.train(texts, 320, TokenizerTraining())
    words.save(folder, _DECODER["max_position_embeddings"])
    kind, settings = FAMILIES[name]
    ids = {f"{role}_token_id": number for role, number in words.ids.items() if role != "mask"}
    known = {key: value for key, value in ids.items() if key in settings} | {"vocab_size": words.vocab_size}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**settings | known | changes)
    getattr(transformers, class_of(name))(config).save_pretrained(folder)
    return folder
