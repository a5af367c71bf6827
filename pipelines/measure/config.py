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
