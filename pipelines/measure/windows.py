"""Which token is scored in which forward pass: windows, masks and batches. Pure numpy.

Shape letters: B rows of a batch, L tokens of a row, N scored tokens of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Window:
    """A stretch of one document that the model sees at once, and the tokens of it that are scored."""

    document: int
    start: int
    """First token shown."""
    length: int
    """Number of tokens shown."""
    scored: Ids
    """Positions in the document of the scored tokens."""


@dataclass(frozen=True)
class Batch:
    """One forward pass."""

    ids: Ids
    """[B, L]."""
    shown: NDArray[np.bool_]
    """[B, L], False where a row is padded (on the right)."""
    rows: Ids
    """[N]: with `columns`, the output whose prediction is scored."""
    columns: Ids
    """[N]."""
    targets: Ids
    """[N]."""
    documents: Ids
    """[N]: which document each scored token is of."""


def causal_windows(length: int, document: int, context: int, stride: int) -> list[Window]:
    """Cover positions 1 to length - 1 of a document, each scored once, from the token before it.

    The first window scores all that it sees; each later one scores at most `stride` tokens and uses the rest of its
    `context` tokens as history, so that no token but the first ones has less history than context - stride.
    """
    windows: list[Window] = []
    first = 1
    while first < length:
        end = min(length, first + (stride if windows else context))
        start = max(0, end - 1 - context)
        windows.append(Window(document, start, end - 1 - start, np.arange(first, end)))
        first = end
    return windows


def masked_windows(document: int, context: int, masked: NDArray[np.bool_]) -> list[Window]:
    """Cut a document into stretches of `context` tokens; the masked positions in them are scored."""
    windows = []
    for start in range(0, len(masked), context):
        hidden = masked[start : start + context]
        windows.append(Window(document, start, len(hidden), start + np.flatnonzero(hidden)))
    return windows


def mask(document_id: str, length: int, rate: float, seed: int) -> NDArray[np.bool_]:
    """Return which positions of a document are hidden: a pure function of its id, the position and the seed.

    The first and the last position (start and end token) are never hidden.
    """
    name = hashlib.blake2b(f"{seed}/{document_id}".encode(), digest_size=8).digest()
    hashed = _mix(np.arange(length, dtype=np.uint64) * _GOLDEN + np.uint64(int.from_bytes(name, "little")))
    hidden = (hashed >> np.uint64(11)).astype(np.float64) * 2.0**-53 < rate
    hidden[[0, -1]] = False
    return hidden


def causal_batches(documents: Sequence[Ids], windows: Sequence[Window], batch_tokens: int) -> list[Batch]:
    """Batch windows of a decoder: the output at a token predicts the next one."""
    return _batches(documents, windows, batch_tokens, offset=1, replace=None)


def masked_batches(documents: Sequence[Ids], windows: Sequence[Window], batch_tokens: int, mask_id: int) -> list[Batch]:
    """Batch windows of an encoder: scored tokens are shown as `mask_id` and predicted where they stand."""
    return _batches(documents, windows, batch_tokens, offset=0, replace=mask_id)


def take(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Return batches spread evenly over all of them, with about `tokens` scored tokens together."""
    total = sum(len(batch.targets) for batch in batches)
    count = min(len(batches), max(1, round(len(batches) * tokens / max(1, total))))
    return [batches[i * len(batches) // count] for i in range(count)]


def _batches(
    documents: Sequence[Ids], windows: Sequence[Window], batch_tokens: int, *, offset: int, replace: int | None
) -> list[Batch]:
    # Rows of equal length and equal number of scored tokens go together: less padding, fewer logits computed.
    ordered = sorted(
        (window for window in windows if len(window.scored)),
        key=lambda w: (-w.length, -len(w.scored), w.document, w.start),
    )
    groups = _group(ordered, lambda w: w.length, batch_tokens)
    return [_batch(documents, group, offset, replace) for group in groups]


def _group(windows: list[Window], length: Callable[[Window], int], batch_tokens: int) -> list[list[Window]]:
    groups: list[list[Window]] = []
    for window in windows:
        # The first window of a group is its longest: all rows are padded to it.
        if groups and (len(groups[-1]) + 1) * length(groups[-1][0]) <= batch_tokens:
            groups[-1].append(window)
        else:
            groups.append([window])
    return groups


def _batch(documents: Sequence[Ids], group: list[Window], offset: int, replace: int | None) -> Batch:
    ids_BL = np.zeros((len(group), group[0].length), dtype=np.int64)
    shown_BL = np.zeros(ids_BL.shape, dtype=np.bool_)
    for row, w in enumerate(group):
        ids_BL[row, : w.length] = documents[w.document][w.start : w.start + w.length]
        shown_BL[row, : w.length] = True
    row_N = np.repeat(np.arange(len(group)), [len(w.scored) for w in group])
    column_N = np.concatenate([w.scored - w.start - offset for w in group])
    target_N = np.concatenate([documents[w.document][w.scored] for w in group])
    if replace is not None:
        ids_BL[row_N, column_N] = replace
    return Batch(ids_BL, shown_BL, row_N, column_N, target_N, np.array([w.document for w in group])[row_N])


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 finalizer (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
