"""Shapes of the model families: presets, validation, and what they cost. No torch, so plans and help stay fast.

Both families share one table of shapes. A decoder layer (attention q, k, v, o and a gated feed-forward) and an encoder
layer (fused qkv, o and a gated feed-forward) have the same number of weights when `kv_heads == heads`.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Family = Literal["decoder", "encoder"]

IGNORED = -100
"""Target of a position that asks for nothing, as torch's cross entropy has it by default."""


class Shape(BaseModel):
    """The size of a model, without its vocabulary."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    family: Family = Field("decoder", description="decoder: causal LM, Llama layout; encoder: masked LM, ModernBERT")
    width: int = Field(256, ge=8, le=65536, description="width of the residual stream")
    layers: int = Field(4, ge=1, le=512, description="number of layers")
    heads: int = Field(4, ge=1, le=1024, description="attention heads; must divide width, into an even head size")
    kv_heads: int | None = Field(None, ge=1, le=1024, description="key and value heads (decoder); none: same as heads")
    head_width: int | None = Field(
        None,
        ge=2,
        le=65536,
        description="width of a head (decoder); none: width / heads. Pruned models have fewer heads",
    )
    ffn_width: int = Field(688, ge=8, le=262144, description="width of the gated feed-forward")
    rope_theta: float = Field(10_000.0, gt=1.0, description="base of the rotary position frequencies")
    tie_embeddings: bool = Field(True, description="one matrix for token embedding and output")
    norm_eps: float = Field(1e-5, gt=0.0, le=1e-2, description="epsilon of the normalisations")
    init_std: float = Field(0.02, gt=0.0, le=1.0, description="standard deviation of initial weights")
    local_window: int = Field(128, ge=2, description="window of the local attention layers, in tokens (encoder)")
    global_every: int = Field(3, ge=1, description="every n-th layer attends globally, the others locally (encoder)")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def key_heads(self) -> int:
        """Number of key and value heads."""
        return self.kv_heads or self.heads

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.head_width is not None:
            if self.family == "encoder" and self.head_width * self.heads != self.width:
                raise ValueError(f"head_width = {self.head_width}: the encoder's is width / heads; valid: none")
            if self.head_width % 2:
                raise ValueError(f"head_width = {self.head_width} must be even, for rotary positions turn pairs")
            if self.width % self.heads:
                raise ValueError(f"heads = {self.heads} does not divide width = {self.width}, as transformers asks")
        elif self.width % self.heads or self.head_size % 2:
            raise ValueError(
                f"heads = {self.heads} does not fit width = {self.width}: width / heads must be a whole, even number; "
                f"valid heads: {_valid_heads(self.width)}"
            )
        if self.heads % self.key_heads:
            divisors = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}; valid: {divisors}")
        if self.family == "encoder" and self.key_heads != self.heads:
            raise ValueError(f"kv_heads = {self.kv_heads}: the encoder has one key head per head ({self.heads})")
        return self


class ArchitectureConfig(Shape):
    """All that is needed to build a model: its shape and what the tokenizer fixes."""

    vocab_size: int = Field(ge=2, description="number of tokens")
    max_positions: int = Field(ge=2, description="longest sequence, in tokens")
    bos_id: int = Field(ge=0, description="token that starts a document")
    eos_id: int = Field(ge=0, description="token that ends a document")
    pad_id: int = Field(ge=0, description="token that fills a sequence; never a target")
    mask_id: int = Field(ge=0, description="token that hides a masked one")

    @model_validator(mode="after")
    def _tokens_exist(self) -> Self:
        for name in ("bos_id", "eos_id", "pad_id", "mask_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(f"{name} = {getattr(self, name)} is outside the vocabulary 0..{self.vocab_size - 1}")
        return self


PRESETS: dict[str, dict[str, int | bool]] = {
    "0.5m": {"width": 64, "layers": 4, "heads": 4, "ffn_width": 176},
    "1m": {"width": 128, "layers": 3, "heads": 4, "ffn_width": 256},
    "4m": {"width": 256, "layers": 4, "heads": 4, "ffn_width": 688},
    "10m": {"width": 384, "layers": 5, "heads": 6, "ffn_width": 1024},
    "30m": {"width": 512, "layers": 8, "heads": 8, "ffn_width": 1376},
    "90m": {"width": 768, "layers": 12, "heads": 12, "ffn_width": 2048},
    "300m": {"width": 1024, "layers": 24, "heads": 16, "ffn_width": 2736},
    "1b": {"width": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "ffn_width": 8192},
    "3b": {"width": 3072, "layers": 28, "heads": 24, "kv_heads": 8, "ffn_width": 8192},
    "7b": {"width": 4096, "layers": 32, "heads": 32, "ffn_width": 11008, "tie_embeddings": False},
}
"""Name -> shape. The name is the number of parameters at the vocabulary of the recipe `demo`, 4,096 tokens, within a
tenth and for both families. Every other token adds `width` of them (twice that where embeddings are not tied)."""
DEMO_VOCABULARY = 4096


def preset(family: Family, name: str, overrides: dict[str, object] | None = None) -> Shape:
    """Return the shape called `name` for `family`, with single values replaced by `overrides`.

    Raises:
        ValueError: an unknown name (with the known ones), an unknown key, or a shape that cannot be built.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    values: dict[str, object] = dict(PRESETS[name])
    if family == "encoder":
        values.pop("kv_heads", None)
    return Shape.model_validate(values | {"family": family} | (overrides or {}))


def count_parameters(config: ArchitectureConfig) -> int:
    """Return the number of parameters of the built model; a tied matrix counts once."""
    return count_embedding(config) + config.layers * _layer_weights(config) + _rest(config)


def count_embedding(config: ArchitectureConfig) -> int:
    """Return the parameters of the token embedding and, when not tied, of the output matrix."""
    return config.vocab_size * config.width * (1 if config.tie_embeddings else 2)


def flops_per_token(config: ArchitectureConfig, sequence_length: int) -> float:
    """Return the floating point operations of one training token, forward and backward.

    Six per weight that multiplies (embedding look-ups do not, the output matrix does), plus the attention products:
    12 * width * attended positions per layer (PaLM, arXiv 2204.02311, appendix B), half of them when causal.
    """
    matmul = config.layers * _layer_weights(config) + config.vocab_size * config.width
    if config.family == "decoder":
        attended = config.layers * sequence_length / 2
    else:
        local = min(config.local_window, sequence_length)
        globally = -(-config.layers // config.global_every)
        attended = globally * sequence_length + (config.layers - globally) * local
    return 6.0 * matmul + 12.0 * config.width * attended


def _layer_weights(config: Shape) -> int:
    attention = (
        2 * config.width * config.heads * config.head_size + 2 * config.width * config.key_heads * config.head_size
    )
    return attention + 3 * config.width * config.ffn_width + 2 * config.width


def _rest(config: ArchitectureConfig) -> int:
    """Everything outside the layers and the token matrices."""
    if config.family == "decoder":
        return config.width
    # Embedding norm, final norm, head (dense and norm), output bias; the first layer has no attention norm.
    return config.width + config.width + config.width * config.width + config.width + config.vocab_size - config.width


def _valid_heads(width: int) -> list[int]:
    return [n for n in range(1, min(width // 2, 1024) + 1) if width % n == 0 and (width // n) % 2 == 0]
