"""Held-out documents laid out as forward passes, the same for every model of one family. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.architectures.config import Family
from pipelines.core.errors import ConfigError
from pipelines.measure import heldout, windows
from pipelines.measure.config import BatchSettings
from pipelines.measure.heldout import Heldout
from pipelines.measure.windows import Batch


@dataclass(frozen=True)
class EvaluationBatches:
    """Which tokens are scored, in which forward passes."""

    batches: Sequence[Batch]
    sizes: NDArray[np.int64]
    """Bytes that the scored tokens of each document stand for [documents]."""
    masked: tuple[NDArray[np.bool_], ...]
    """Masked positions of each document; empty for a decoder."""

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return sum(len(batch.targets) for batch in self.batches)


def plan_batches(settings: BatchSettings, documents: Heldout, family: Family, prepared: Path) -> EvaluationBatches:
    """Lay out the forward passes.

    A decoder is scored on every token of every document, an encoder on the tokens that a mask hides.

    Args:
        settings: windows, masks and batch size.
        documents: what is scored.
        family: of the model.
        prepared: folder of the prepare artifact, for the tokenizer.

    Raises:
        ConfigError: the stride or the batch does not fit the context, which may come from the prepared data.
    """
    context, stride = window_tokens(settings, documents), stride_tokens(settings, documents)
    if stride > context or settings.batch_tokens < context:
        raise ConfigError(
            f"evaluate.stride = {stride} and evaluate.batch_tokens = {settings.batch_tokens} do not fit a context of "
            f"{context} tokens; valid: a stride of 1 to {context}, and {context} or more batch tokens"
        )
    tokenizer = prepared / "tokenizer" / heldout.TOKENIZER
    unknown = heldout.unknown_id(tokenizer)
    if family == "decoder":
        cuts = [
            window
            for number, ids in enumerate(documents.tokens)
            for window in windows.causal_windows(len(ids), number, context, stride)
        ]
        batches = windows.causal_batches(documents.tokens, cuts, settings.batch_tokens)
        return EvaluationBatches(batches, _known_bytes(tokenizer, documents, unknown), ())
    masked = tuple(
        windows.mask(document.id, len(ids), settings.mask_rate, settings.mask_seed) & (ids != unknown)
        for document, ids in zip(documents.documents, documents.tokens, strict=True)
    )
    cuts = [w for number, hidden in enumerate(masked) for w in windows.masked_windows(number, context, hidden)]
    each = heldout.token_bytes(tokenizer, documents.documents, documents.tokens)
    sizes = [size[hidden].sum() for size, hidden in zip(each, masked, strict=True)]
    batches = windows.masked_batches(documents.tokens, cuts, settings.batch_tokens, documents.index["mask_id"])
    return EvaluationBatches(batches, np.array(sizes, dtype=np.int64), masked)


def _known_bytes(tokenizer: Path, documents: Heldout, unknown: int | None) -> NDArray[np.int64]:
    """Return the bytes of each document, less those that an unknown token stands for: it does not tell them."""
    if unknown is None or not any((ids == unknown).any() for ids in documents.tokens):
        return documents.sizes
    each = heldout.token_bytes(tokenizer, documents.documents, documents.tokens)
    return np.array([size.sum() for size in each], dtype=np.int64)


def description(settings: BatchSettings, documents: Heldout, family: Family) -> dict[str, int | float]:
    """Return the settings that numbers depend on, as they were in force: numbers compare only where these are equal."""
    context = window_tokens(settings, documents)
    if family == "decoder":
        return {"context": context, "stride": stride_tokens(settings, documents)}
    return {"context": context, "mask_rate": settings.mask_rate, "mask_seed": settings.mask_seed}


def stride_tokens(settings: BatchSettings, documents: Heldout) -> int:
    """Return how many tokens of a decoder's window are scored: the setting, or three quarters of the window."""
    return settings.stride or max(1, window_tokens(settings, documents) * 3 // 4)


def window_tokens(settings: BatchSettings, documents: Heldout) -> int:
    """Return how many tokens a window shows: the setting, or the sequence length of the prepared data."""
    return settings.context or int(documents.index["sequence_length"])
