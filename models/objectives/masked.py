"""Restore masked tokens (BERT's rule, by default at the rate of arXiv 2202.08005)."""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import Field, model_validator

from models.objectives import base
from models.objectives.base import IGNORED, Ids, NoSettings, philox

_HALF = np.uint64(32)
_TWO_32 = float(2**32)


class MaskingConfig(NoSettings):
    """Which tokens are masked, and how."""

    probability: float = Field(0.3, gt=0.0, lt=1.0, description="Share of tokens that are targets.")
    mask: float = Field(0.8, ge=0.0, le=1.0, description="Share of targets shown as the mask token.")
    random: float = Field(0.1, ge=0.0, le=1.0, description="Share of targets shown as a random token; the rest stay.")

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.mask + self.random > 1.0 + 1e-9:
            raise ValueError(f"mask + random = {self.mask + self.random:g}; together they may be at most 1")
        return self


def mask_tokens(
    tokens_T: Ids, *, seed: int, sample: int, epoch: int, rule: MaskingConfig, vocab_size: int, special: tuple[int, ...]
) -> tuple[Ids, Ids]:
    """Return (inputs, targets) of one sequence under masked language modelling.

    A token is a target with `rule.probability`; a target is shown as the mask token (the last of `special`), as a
    random token, or as itself. Special tokens are never targets, and never shown for one: a start token amid a
    document would cut it in two, so a target that draws one stays. The choice is a pure function of (seed, sample,
    epoch): each 64-bit word of the sample's own stream decides one token, its high half whether, its low half how.
    """
    length = len(tokens_T)
    words = philox(seed, sample, 2 * length, block=epoch + 1)
    label_mask_T = (words[:length] >> _HALF) < rule.probability * _TWO_32
    label_mask_T &= ~np.isin(tokens_T, special)
    kind = (words[:length] & np.uint64(2**32 - 1)) / _TWO_32
    random_tokens = (words[length:] % np.uint64(vocab_size)).astype(tokens_T.dtype)
    random_tokens = np.where(np.isin(random_tokens, special), tokens_T, random_tokens)
    inputs_T = np.where(label_mask_T & (kind < rule.mask), special[-1], tokens_T)
    inputs_T = np.where(label_mask_T & (kind >= rule.mask) & (kind < rule.mask + rule.random), random_tokens, inputs_T)
    return inputs_T, np.where(label_mask_T, tokens_T, IGNORED)


class Objective(base.Objective):
    """Masked language modelling."""

    families = frozenset({"encoder"})
    Config = MaskingConfig

    @classmethod
    def target_share(cls, settings: MaskingConfig) -> float:
        """Return the rate of masking."""
        return settings.probability

    def targets(self, tokens_BT: Ids, samples_B: Ids, epochs_B: Ids) -> tuple[Ids, Ids]:
        """Return the sequences, each masked by its own stream of this epoch, and what was masked."""
        context = self.context
        pairs = [
            mask_tokens(
                tokens_T,
                seed=context.seed,
                sample=int(sample),
                epoch=int(epoch),
                rule=self.settings,
                vocab_size=context.vocab_size,
                special=context.special,
            )
            for tokens_T, sample, epoch in zip(tokens_BT, samples_B, epochs_B, strict=True)
        ]
        inputs, targets = zip(*pairs, strict=True)
        return np.stack(inputs), np.stack(targets)
