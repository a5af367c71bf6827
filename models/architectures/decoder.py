"""The decoder family: causal language models in the Llama layout of transformers."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

from models.architectures.config import ArchitectureConfig


def layout(config: ArchitectureConfig) -> LlamaConfig:
    """Return the transformers configuration that stands for `config`."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_heads,
        head_dim=config.head_size,
        max_position_embeddings=config.max_positions,
        initializer_range=config.init_std,
        rms_norm_eps=config.norm_eps,
        bos_token_id=config.bos_id,
        eos_token_id=config.eos_id,
        pad_token_id=config.pad_id,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        use_cache=False,
    )


def construct(config: ArchitectureConfig) -> LlamaForCausalLM:
    """Return the model with weights that are not yet initialised; see `build.build`."""
    return LlamaForCausalLM(layout(config))
