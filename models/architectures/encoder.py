"""The encoder family: masked language models in the ModernBERT layout of transformers."""

from __future__ import annotations

from transformers import ModernBertConfig, ModernBertForMaskedLM

from models.architectures.config import ArchitectureConfig


def layout(config: ArchitectureConfig) -> ModernBertConfig:
    """Return the transformers configuration that stands for `config`."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return ModernBertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.max_positions,
        initializer_range=config.init_std,
        norm_eps=config.norm_eps,
        bos_token_id=config.bos_id,
        cls_token_id=config.bos_id,
        eos_token_id=config.eos_id,
        sep_token_id=config.eos_id,
        pad_token_id=config.pad_id,
        local_attention=config.local_window,
        layer_types=_layer_types(config),
        rope_parameters={"full_attention": dict(rope), "sliding_attention": dict(rope)},
        tie_word_embeddings=config.tie_embeddings,
    )


def construct(config: ArchitectureConfig) -> ModernBertForMaskedLM:
    """Return the model with weights that are not yet initialised; see `build.build`."""
    return ModernBertForMaskedLM(layout(config))


def _layer_types(config: ArchitectureConfig) -> list[str]:
    return ["sliding_attention" if n % config.global_every else "full_attention" for n in range(config.layers)]
