"""Prompts from held-out documents: their first words, for an encoder with one of them missing. No torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from models.architectures.config import Family
from pipelines.data import tokenizer as tokenization
from pipelines.measure import heldout
from pipelines.measure.heldout import Document

MASKS = re.compile(r"[ \t]?(?:" + "|".join(map(re.escape, (tokenization.MASK, "[MASK]"))) + r"|_{3,})")
"""How a mask is written in a prompt. The blank before it goes too: a word's token begins with its blank."""
COUNT = 3
"""Prompts where nobody says how many."""
_WORD = re.compile(r"\s*\S+")
_WORDS = {"decoder": 8, "encoder": 24}
_FEWEST_WORDS = 3


@dataclass(frozen=True)
class Opening:
    """The beginning of a document as a prompt."""

    text: str
    answer: str | None = None
    """The word that is missing in an encoder's prompt."""


def of(
    documents: Sequence[Document], tokenizer: Tokenizer, family: Family, *, count: int, positions: int
) -> list[Opening]:
    """Return at most `count` prompts, from documents that are picked by the hash of their ids.

    A document gives none where it begins with too few words, or, for an encoder, where no word among them is one token.

    Args:
        documents: to choose from.
        tokenizer: of the model.
        family: of the model.
        count: prompts.
        positions: tokens of the sequences that the model was trained on; a decoder's prompt leaves half of them free.
    """
    most = positions // 2 if family == "decoder" else positions * 3 // 4
    make = _whole if family == "decoder" else _with_a_mask
    words = (_words(documents[place].text, tokenizer, _WORDS[family], most) for place in heldout.ranked(documents))
    openings = (make(first, tokenizer) for first in words if len(first) >= _FEWEST_WORDS)
    return list(itertools.islice((opening for opening in openings if opening is not None), count))


def _words(text: str, tokenizer: Tokenizer, count: int, most_tokens: int) -> list[str]:
    """Return the first words of a text with the blanks before them, as many as fit."""
    words = [match.group() for match in itertools.islice(_WORD.finditer(text.strip()), count)]
    while words and len(tokenization.encode(tokenizer, ["".join(words)])[0]) > most_tokens:
        words.pop()
    return words


def _whole(words: list[str], _tokenizer: Tokenizer) -> Opening:
    return Opening("".join(words))


def _with_a_mask(words: list[str], tokenizer: Tokenizer) -> Opening | None:
    """Return the words with a mask in place of the one nearest to the middle that is a single token."""
    middle = len(words) // 2
    for place in sorted(range(1, len(words)), key=lambda place: (abs(place - middle), place)):
        word = words[place]
        if word[0] == " " and len(tokenization.encode(tokenizer, [word])[0]) == 1:
            return Opening(f"{''.join(words[:place])} {tokenization.MASK}{''.join(words[place + 1 :])}", word.strip())
    return None
