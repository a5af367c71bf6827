"""Packing: documents end to end in sequences of one length.

Each document becomes `<|bos|> text <|eos|>`; documents follow each other without padding and may cross from one
sequence into the next. A document starts where a `<|bos|>` stands. The tail that does not fill a sequence is dropped:
it is less than one sequence per split, and no consumer then needs to know about padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def pack(
    documents: Iterable[Sequence[int]], sequence_length: int, *, bos_id: int, eos_id: int
) -> Iterator[NDArray[np.int64]]:
    """Yield full sequences, int64 [sequences, sequence_length], a block per document that completes any.

    Args:
        documents: token ids of each document, without special tokens.
        sequence_length: tokens per sequence.
        bos_id: put before each document.
        eos_id: put after each document.
    """
    pending: list[NDArray[np.int64]] = []
    waiting = 0  # tokens in `pending`: joined only once they fill a sequence, so that time is linear
    for tokens in documents:
        pending.append(np.concatenate([[bos_id], np.asarray(tokens, dtype=np.int64), [eos_id]]))
        waiting += len(tokens) + 2
        if full := waiting // sequence_length:
            joined = np.concatenate(pending)
            yield joined[: full * sequence_length].reshape(full, sequence_length)
            pending = [joined[full * sequence_length :]]
            waiting -= full * sequence_length
