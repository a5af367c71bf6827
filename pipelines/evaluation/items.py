"""Multiple-choice and addition items made from held-out text. Pure functions of (documents, seed, count); no torch.

next_line   the lines before, and which of four lines follows; the wrong ones are lines of the same source and of
            similar length.
word_order  the lines before, and which of four orders of the next line's words follows; the wrong ones exchange two
            neighbours. The one of these that a model of a few million parameters learns something of.
cloze       the text before a rare word, and which of four words follows; the wrong ones are words of similar length
            and frequency.
addition    `a+b=` in the plain format of "Teaching Arithmetic to Small Transformers" (Lee et al. 2023), with numbers of
            one to three digits, the lengths in balance; right when greedy decoding writes the exact sum.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.measure.heldout import Document

Item = dict[str, Any]
CHOICES = 4
_CONTEXT_CHARACTERS = 300
_LINE_CHARACTERS = range(20, 161)
_WORDS_TO_ORDER = 5
_RARE = range(2, 21)
"""How often a cloze word occurs in the test split."""
_WORD = re.compile(r"[^\W\d_]{5,14}")
_ONE_BLANK = re.compile(r"\S $")
_SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+")


# ---- next line --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    document: int
    number: int
    source: str
    text: str


def next_line(documents: Sequence[Document], count: int, seed: int) -> list[Item]:
    """Return up to `count` items {"context", "choices", "label"}."""
    texts = [lines_of(document.text) for document in documents]
    pool = [
        _Line(d, n, documents[d].source, text)
        for d, lines in enumerate(texts)
        for n, text in enumerate(lines)
        if len(text) in _LINE_CHARACTERS
    ]
    by_source = _by_length(pool)
    rng = random.Random(f"{seed}/next_line")
    items = []
    for line in rng.sample(pool, len(pool)):
        wrong = _similar_lines(line, by_source[line.source], rng) if line.number else []
        if len(wrong) == CHOICES - 1:
            items.append(_item(_before(texts[line.document][: line.number]), line.text, wrong, rng))
        if len(items) == count:
            break
    return items


def word_order(documents: Sequence[Document], count: int, seed: int) -> list[Item]:
    """Return up to `count` items {"context", "choices", "label"}; wrong choices exchange two neighbouring words."""
    texts = [lines_of(document.text) for document in documents]
    places = [
        (d, n)
        for d, lines in enumerate(texts)
        for n, text in enumerate(lines)
        if n and len(text) in _LINE_CHARACTERS and len(text.split()) >= _WORDS_TO_ORDER
    ]
    rng = random.Random(f"{seed}/word_order")
    items = []
    for document, number in rng.sample(places, len(places)):
        words = texts[document][number].split()
        right = " ".join(words)
        orders = {" ".join([*words[:i], words[i + 1], words[i], *words[i + 2 :]]) for i in range(len(words) - 1)} - {
            right
        }
        if len(orders) >= CHOICES - 1:
            wrong = rng.sample(sorted(orders), CHOICES - 1)
            items.append(_item(_before(texts[document][:number]), right, wrong, rng))
        if len(items) == count:
            break
    return items


def lines_of(text: str) -> list[str]:
    """Return the filled lines of a text; of a text with hardly any line breaks, its sentences."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines if len(lines) >= 4 else [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def _by_length(pool: list[_Line]) -> dict[str, list[_Line]]:
    grouped: dict[str, list[_Line]] = defaultdict(list)
    for line in sorted(pool, key=lambda x: (len(x.text), x.document, x.number)):
        grouped[line.source].append(line)
    return grouped


def _similar_lines(line: _Line, by_length: list[_Line], rng: random.Random) -> list[str]:
    """Return three different lines near `line` in length."""
    middle = bisect_left(by_length, len(line.text), key=lambda x: len(x.text))
    near = by_length[max(0, middle - 20) : middle + 40]
    texts = sorted({other.text for other in near if other.text != line.text})
    return rng.sample(texts, CHOICES - 1) if len(texts) >= CHOICES - 1 else []


def _before(lines: list[str]) -> str:
    """Return the last lines that fit into the context, at least one."""
    kept: list[str] = []
    for line in reversed(lines):
        if kept and sum(map(len, kept)) + len(line) > _CONTEXT_CHARACTERS:
            break
        kept.insert(0, line)
    return "\n".join(kept)[-_CONTEXT_CHARACTERS:].strip()


# ---- cloze ------------------------------------------------------------------------------------------------------


def cloze(documents: Sequence[Document], count: int, seed: int) -> list[Item]:
    """Return up to `count` items {"context", "choices", "label"}, one per word."""
    frequency: Counter[str] = Counter()
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, document in enumerate(documents):
        for match in _WORD.finditer(document.text):
            frequency[match.group()] += 1
            if match.start() >= _CONTEXT_CHARACTERS // 3 and _ONE_BLANK.search(document.text[: match.start()][-2:]):
                places[match.group()].append((number, match.start()))
    known = (word for word, times in frequency.items() if word.islower() and times in _RARE)
    rare = sorted(known, key=lambda word: (len(word), frequency[word], word))
    rng = random.Random(f"{seed}/cloze")
    items: list[Item] = []
    for rank in rng.sample(range(len(rare)), len(rare)):
        if len(items) == count:
            break
        near = [word for word in rare[max(0, rank - 12) : rank + 13] if word != rare[rank]]
        if len(near) >= CHOICES - 1 and places[rare[rank]]:
            number, start = rng.choice(places[rare[rank]])
            context = _cut(documents[number].text[max(0, start - _CONTEXT_CHARACTERS) : start])
            items.append(_item(context, rare[rank], rng.sample(near, CHOICES - 1), rng))
    return items


def _cut(text: str) -> str:
    """Drop the first, perhaps broken, word and the blank at the end."""
    return text[text.find(" ") + 1 :].rstrip()


# ---- addition ---------------------------------------------------------------------------------------------------


def addition(count: int, seed: int) -> list[Item]:
    """Return `count` different items {"context", "answer"}; both numbers have 1, 2 or 3 digits, equally often.

    After 200 items the lengths are 2 and 3: there are only 81 pairs of one digit.
    """
    rng = random.Random(f"{seed}/addition")
    seen: set[tuple[int, int]] = set()
    items: list[Item] = []
    while len(items) < count:
        digits = 1 + len(items) % 3 if len(items) < 200 else 2 + len(items) % 2
        pair = rng.randrange(10 ** (digits - 1), 10**digits), rng.randrange(10 ** (digits - 1), 10**digits)
        if pair not in seen:
            seen.add(pair)
            items.append({"context": f"{pair[0]}+{pair[1]}=", "answer": str(sum(pair))})
    return items


def _item(context: str, right: str, wrong: list[str], rng: random.Random) -> Item:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"context": context, "choices": choices, "label": choices.index(right)}
