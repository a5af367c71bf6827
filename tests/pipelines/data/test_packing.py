"""Packing: every token once, no document cut that fits, little padding; the map tells where each part lies."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.architectures import documents as boundaries
from pipelines.data.packing import Block, best_fit, concatenated

BOS, EOS, PAD = 0, 1, 2
documents = st.lists(st.lists(st.integers(4, 99), max_size=40), max_size=20)
lengths = st.integers(2, 17)
Texts = list[list[int]]


def packed(texts: Texts, length: int, buffer_tokens: int = 1 << 20) -> list[Block]:
    ids = {"bos_id": BOS, "eos_id": EOS, "pad_id": PAD}
    return list(best_fit(iter(texts), length, **ids, buffer_tokens=buffer_tokens))


def parts(blocks: list[Block]) -> list[tuple[int, int, list[int]]]:
    """(document, offset, tokens) of every stretch between two boundaries that is not padding, and by the map."""
    read, mapped = [], []
    for block in blocks:
        starts_ST = boundaries.starts(block.tokens_ST, bos_id=BOS, pad_id=PAD)
        places = {(row, column): (document, offset) for row, column, document, offset in block.map_P4.tolist()}
        mapped += list(places)
        for row, (starts_T, tokens_T) in enumerate(zip(starts_ST, block.tokens_ST, strict=True)):
            columns = np.flatnonzero(starts_T).tolist()
            for column, piece in zip(columns, np.split(tokens_T, columns[1:]), strict=True):
                if piece[0] != PAD:
                    read.append((*places[row, column], piece.tolist()))
    assert len(read) == len(mapped)
    return sorted(read)


def together(found: list[tuple[int, int, list[int]]]) -> dict[int, list[int]]:
    whole: dict[int, list[int]] = {}
    for document, offset, tokens in found:
        assert offset == len(whole.setdefault(document, []))
        whole[document] += tokens
    return whole


@settings(deadline=None)
@given(documents, lengths, st.sampled_from([1, 30, 1 << 20]))
def test_the_tokens_alone_tell_the_parts_and_these_give_the_documents_back(
    texts: Texts, length: int, buffer_tokens: int
) -> None:
    blocks = packed(texts, length, buffer_tokens)
    expected = {number: [BOS, *text, EOS] for number, text in enumerate(texts)}
    assert together(parts(blocks)) == expected
    assert all(block.tokens_ST.shape[1] == length for block in blocks)


@settings(deadline=None)
@given(documents, lengths)
def test_only_documents_that_are_longer_than_a_sequence_are_cut(texts: Texts, length: int) -> None:
    for document, offset, tokens in parts(packed(texts, length)):
        size = len(texts[document]) + 2
        assert len(tokens) == min(length, size - offset)
        assert offset % length == 0


@pytest.mark.parametrize("kind", ["short", "long", "mixed"])
def test_hardly_a_token_is_padding(kind: str) -> None:
    rng = random.Random(0)
    sizes = {"short": (0.3, 40), "long": (0.3, 700), "mixed": (1.4, 120)}
    spread, middle = sizes[kind]
    texts = [[7] * max(1, round(rng.lognormvariate(0, spread) * middle)) for _ in range(4000)]
    blocks = packed(texts, 256)
    tokens_ST = np.concatenate([block.tokens_ST for block in blocks])
    assert (tokens_ST == PAD).mean() < {"short": 0.02, "long": 0.02, "mixed": 0.005}[kind]


def test_sequences_come_in_the_order_of_their_first_documents() -> None:
    texts = [[number] * (number % 30) for number in range(4, 90)]
    (block,) = packed(texts, 32)
    firsts = [min(block.map_P4[block.map_P4[:, 0] == row, 2]) for row in range(len(block.tokens_ST))]
    assert firsts == sorted(firsts)


def stream(blocks: list[Block], length: int) -> np.ndarray:
    return np.concatenate([block.tokens_ST for block in blocks]) if blocks else np.empty((0, length), dtype=np.int64)


@settings(deadline=None)
@given(documents, st.integers(1, 17))
def test_concatenated_sequences_are_the_stream_of_documents_cut_at_the_length(texts: Texts, length: int) -> None:
    expected = [token for text in texts for token in (BOS, *text, EOS)]
    blocks = list(concatenated(iter(texts), length, bos_id=BOS, eos_id=EOS))
    sequences = stream(blocks, length)
    full = len(expected) // length
    assert sequences.tolist() == [expected[i * length : (i + 1) * length] for i in range(full)]
    for block in blocks:
        for row, column, document, offset in block.map_P4.tolist():
            assert block.tokens_ST[row, column] == [BOS, *texts[document], EOS][offset]
    mapped = sum(len(block.map_P4) for block in blocks)
    begins = [place for place in range(full * length) if place % length == 0 or expected[place] == BOS]
    assert mapped == len(begins)


def test_packing_copies_a_token_a_few_times_however_long_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining the tail again for each document copied every token as often as documents fit a sequence."""
    copied = 0
    concatenate = np.concatenate

    def counting(arrays: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal copied
        result = concatenate(arrays, *args, **kwargs)
        copied += result.size
        return result

    monkeypatch.setattr(np, "concatenate", counting)
    texts = [[7] * 6] * 1000  # 8 tokens each, 2 sequences of 500 documents
    assert sum(len(b.tokens_ST) for b in concatenated(iter(texts), 4000, bos_id=BOS, eos_id=EOS)) == 2
    assert copied <= 4 * 8000
