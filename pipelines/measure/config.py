"""Settings of how held-out text is laid out in forward passes. No torch, no numpy: `ingot plan` reads them."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from pipelines.core.settings import Settings


class BatchSettings(Settings):
    """Windows, masks and batches of held-out text."""

    context: int | None = Field(
        default=None, ge=8, description="Tokens a window shows the model. Default: the sequence length of prepare."
    )
    stride: int | None = Field(
        default=None,
        ge=1,
        description="Tokens scored per window of a decoder; the rest of the window is context. "
        "Default: three quarters of the context.",
    )
    mask_rate: float = Field(default=0.15, gt=0.0, lt=1.0, description="Share of tokens an encoder has to restore.")
    mask_seed: int = Field(default=0, ge=0, description="Seed of the masks of an encoder.")
    batch_tokens: int = Field(
        default=4096,
        ge=16,
        description="Tokens per forward pass. Part of the identity: another batch shape rounds differently.",
    )

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        if self.context is not None and self.stride is not None and self.stride > self.context:
            raise ValueError(
                f"stride {self.stride} is longer than context {self.context}: tokens would be left out; "
                f"valid: 1 to {self.context}"
            )
        if self.context is not None and self.batch_tokens < self.context:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} does not hold one window of context {self.context}; "
                f"valid: {self.context} or more"
            )
        return self


class SamplingSettings(Settings):
    """How a decoder's next token is drawn from what it predicts."""

    temperature: float = Field(
        default=0.8, ge=0.0, le=100.0, description="Divides the logits before a token is drawn; 0 takes the likeliest."
    )
    top_k: int | None = Field(default=None, ge=1, description="Draw from this many of the likeliest tokens. None: all.")
    top_p: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="Draw from the likeliest tokens that together have this probability. None: all.",
    )
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="Seed of the draws of every text. None: 0.")

    @model_validator(mode="after")
    def _every_setting_counts(self) -> Self:
        idle = [name for name in ("top_k", "top_p", "seed") if getattr(self, name) is not None]
        if self.temperature == 0.0 and idle:
            raise ValueError(f"{', '.join(idle)} does nothing with temperature 0: nothing is drawn")
        return self
