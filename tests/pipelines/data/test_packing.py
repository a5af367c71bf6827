"""Packing: nothing but the tail is lost, and unpacking gives the documents back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.packing import pack

BOS, EOS = 0, 1
documents = st.lists(st.lists(st.integers(4, 99), max_size=40), max_size=20)
lengths = st.integers(1, 17)


def packed(texts: list[list[int]], length: int) -> np.ndarray:
    blocks = list(pack(iter(texts), length, bos_id=BOS, eos_id=EOS))
    return np.concatenate(blocks) if blocks else np.empty((0, length), dtype=np.int64)


def unpack(sequences: np.ndarray) -> list[list[int]]:
    """The inverse: documents start at BOS; a cut last one is returned as far as it goes."""
    restored: list[list[int]] = []
    for token in sequences.ravel().tolist():
        if token == BOS:
            restored.append([])
        elif token != EOS:
            restored[-1].append(token)
    return restored


@given(documents, lengths)
def test_the_sequences_are_the_stream_of_documents_cut_at_the_length(texts: list[list[int]], length: int) -> None:
    stream = [token for text in texts for token in (BOS, *text, EOS)]
    sequences = packed(texts, length)
    full = len(stream) // length
    assert sequences.dtype == np.int64
    assert sequences.tolist() == [stream[i * length : (i + 1) * length] for i in range(full)]


@given(documents, lengths)
def test_unpacking_restores_every_document_but_the_cut_last_ones(texts: list[list[int]], length: int) -> None:
    restored = unpack(packed(texts, length))
    whole = restored[:-1]
    assert whole == texts[: len(whole)]
    if restored:
        assert texts[len(whole)][: len(restored[-1])] == restored[-1]
    lost = sum(len(text) + 2 for text in texts) - sum(len(text) + 2 for text in whole)
    assert lost <= max((len(text) + 2 for text in texts), default=0) + length


def test_packing_copies_a_token_a_few_times_however_long_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining the tail again for each document copied every token as often as documents fit a sequence."""
    copied = 0
    concatenate = np.concatenate

    def counting(parts: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal copied
        result = concatenate(parts, *args, **kwargs)
        copied += result.size
        return result

    monkeypatch.setattr(np, "concatenate", counting)
    texts = [[7] * 6] * 1000  # 8 tokens each, 2 sequences of 500 documents
    assert packed(texts, 4000).shape == (2, 4000)
    assert copied <= 4 * 8000


@given(documents)
def test_a_length_that_divides_the_stream_restores_everything(texts: list[list[int]]) -> None:
    stream = sum(len(text) + 2 for text in texts)
    assert unpack(packed(texts, max(stream, 1))) == texts
