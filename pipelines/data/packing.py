"""Packing: documents laid into sequences of one length, so that hardly a token is padding and no document is cut.

Each document becomes `<|bos|> text <|eos|>`. One that is longer than a sequence is cut into parts of its length; the
rest of it, and every document that fits, is laid whole into the fullest sequence that has room for it (best fit
decreasing: "Fewer Truncations Improve Language Modeling", arXiv 2404.10830). What stays free is filled with padding.

Where a document or a part of one begins can be read from the tokens, see `models.architectures.documents`: at the start
of a sequence, at a start token, and behind padding. So a rest, which has no start token, either comes first in its
sequence or has one padding token before it.

Documents are packed a buffer at a time: memory is bounded, and sequences come in about the order of the corpus.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
BUFFER_TOKENS = 1 << 23
"""Tokens that are packed together: with more, the few sequences that stay half empty at the end weigh less."""


@dataclass(frozen=True)
class Part:
    """A document, or a part of one, that lies in one sequence."""

    document: int
    """Number of the document in its split."""
    offset: int
    """Its token that the part begins with; the start token is number 0."""
    tokens: Ids


@dataclass(frozen=True)
class Block:
    """Sequences, and where each part of a document lies in them."""

    tokens_ST: Ids
    map_P4: Ids
    """Of each part: sequence (counted in the block), first column, document, first token of the document."""

    @classmethod
    def of_rows(cls, tokens_ST: Ids, first: int = 0) -> Block:
        """Return sequences of which each is a document of its own, numbered from `first`."""
        rows_S = np.arange(len(tokens_ST))
        return cls(tokens_ST, np.stack([rows_S, 0 * rows_S, rows_S + first, 0 * rows_S], axis=1))


def best_fit(
    documents: Iterable[Sequence[int]],
    length: int,
    *,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    buffer_tokens: int = BUFFER_TOKENS,
) -> Iterator[Block]:
    """Yield blocks of sequences that hold every token of every document once.

    Args:
        documents: token ids of each document, without special tokens.
        length: tokens of a sequence, at least 2.
        bos_id: put before each document.
        eos_id: put after each document.
        pad_id: fills what stays free.
        buffer_tokens: tokens that are packed together.
    """
    waiting: list[Part] = []
    size = 0
    for number, document in enumerate(documents):
        tokens = np.concatenate([[bos_id], np.asarray(document, dtype=np.int64), [eos_id]])
        waiting += [Part(number, start, tokens[start : start + length]) for start in range(0, len(tokens), length)]
        size += len(tokens)
        if size >= buffer_tokens:
            yield _block(waiting, length, pad_id)
            waiting, size = [], 0
    if waiting:
        yield _block(waiting, length, pad_id)


def _block(parts: list[Part], length: int, pad_id: int) -> Block:
    sequences = _fitted([_room(part, length) for part in parts], length)
    sequences.sort(key=min)  # by the first document in each
    tokens_ST = np.full((len(sequences), length), pad_id, dtype=np.int64)
    places = []
    for row, members in enumerate(sequences):
        # Rests come first: the one that stands at the start needs no padding before it.
        column = 0
        for part in sorted((parts[member] for member in members), key=lambda p: (p.offset == 0, p.document)):
            column += part.offset > 0 and column > 0
            tokens_ST[row, column : column + len(part.tokens)] = part.tokens
            places.append((row, column, part.document, part.offset))
            column += len(part.tokens)
    return Block(tokens_ST, np.array(places, dtype=np.int64).reshape(-1, 4))


def _room(part: Part, length: int) -> int:
    """Return the places that a part takes: a rest also one for the padding before it, unless it fills a sequence."""
    return min(len(part.tokens) + (part.offset > 0), length)


def _fitted(sizes: list[int], length: int) -> list[list[int]]:
    """Return which parts lie together: best fit decreasing, in O(n log n).

    Sequences with equally much room are kept in one list, so the search is among at most `length` rooms.
    """
    sequences: list[list[int]] = []
    rooms: list[int] = []
    """Different amounts of room that sequences have, ascending."""
    with_room: dict[int, list[int]] = {}
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        place = bisect_left(rooms, sizes[number])
        if place == len(rooms):
            sequences.append([])
            chosen, room = len(sequences) - 1, length
        else:
            room = rooms[place]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        sequences[chosen].append(number)
        if left := room - sizes[number]:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(chosen)
    return sequences


def concatenated(documents: Iterable[Sequence[int]], length: int, *, bos_id: int, eos_id: int) -> Iterator[Block]:
    """Yield full sequences of documents laid end to end, which may cross from one sequence into the next.

    The tail that does not fill a sequence is left out; nothing is padding.

    Args:
        documents: token ids of each document, without special tokens.
        length: tokens of a sequence.
        bos_id: put before each document.
        eos_id: put after each document.
    """
    pending: list[Ids] = []
    places: list[tuple[int, int, int, int]] = []
    waiting = 0  # tokens in `pending`: joined only once they fill a sequence, so that time is linear
    for number, document in enumerate(documents):
        tokens = np.concatenate([[bos_id], np.asarray(document, dtype=np.int64), [eos_id]])
        pending.append(tokens)
        ends = range(waiting // length * length + length, waiting + len(tokens), length)
        cuts = [waiting, *(end for end in ends if end > waiting)]
        places += [(*divmod(cut, length), number, cut - waiting) for cut in cuts]
        waiting += len(tokens)
        if full := waiting // length:
            joined = np.concatenate(pending)
            done = [place for place in places if place[0] < full]
            yield Block(joined[: full * length].reshape(full, length), np.array(done, dtype=np.int64).reshape(-1, 4))
            pending, waiting = [joined[full * length :]], waiting - full * length
            places = [(0, *place[1:]) for place in places if place[0] >= full]
