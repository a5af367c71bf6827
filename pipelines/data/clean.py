"""Cleaning: what is done to the text that is trained on, and the normal form that duplicates are found in.

The two differ on purpose. Cleaning keeps every distinction a reader can see. The normal form drops what a reader
cannot see or would not mind (case, punctuation, width, zero-width characters, letters that only look Latin), so that
noise of that kind does not hide a copy.

The units of the normal form are words with their marks (a Hindi vowel sign is part of its word) and, where a script
puts no spaces between words, single characters. Duplicates, repetition and contamination are measured in these units.
"""

from __future__ import annotations

import re
import unicodedata

import regex

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_NEWLINES = re.compile(r"\r\n?|\u2028|\u2029|\x85")
_WORD = re.compile(r"\w+")
_ASCII_WORD = re.compile(r"[a-z0-9_]+")
_SPACELESS = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Javanese}\p{Balinese}"
)
"""Scripts that write no spaces between words."""
_UNIT = regex.compile(
    rf"(?V1)[[{_SPACELESS}]&&[\p{{L}}\p{{N}}\u30fc]]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}_]--[{_SPACELESS}]]+"
)
_NEEDS_UNITS = regex.compile(rf"[\p{{M}}{_SPACELESS}]")
_HALF_WORD = regex.compile(r"[\u30fc\p{Han}\p{Hiragana}\p{Katakana}]")
_QUARTER_WORD = regex.compile(r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Javanese}\p{Balinese}]")
INVISIBLE = re.compile(r"[\u00ad\u034f\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")

_LOOKALIKES = str.maketrans(
    "\u0430\u0441\u0501\u0435\u04bb\u0456\u0458\u04cf\u043e\u0440\u051b\u0455\u051d\u0445\u0443"
    "\u03b1\u03bf\u03bd\u03c1\u03b9\u03ba",
    "acdehijlopqswxyaovpik",
)
"""Cyrillic and Greek lower-case letters -> the Latin letters that they are drawn like."""


def clean(text: str) -> str:
    r"""Return the text in Unicode NFC with `\n` line ends and without control characters (tabs stay)."""
    return _CONTROLS.sub("", _NEWLINES.sub("\n", unicodedata.normalize("NFC", text)))


def words(text: str) -> list[str]:
    """Return the units of the normal form of a text: words with marks, characters where no spaces part words."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    normal = unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).casefold().translate(_LOOKALIKES)
    return (_UNIT if _NEEDS_UNITS.search(normal) else _WORD).findall(normal)


def weight(unit: str) -> int:
    """Return how much of a word a unit is, in quarters: a word 4, a Han or kana character 2, a Thai one 1."""
    first = unit[0]
    if first < "\u0e00":
        return 4
    return 2 if _HALF_WORD.match(first) else 1 if _QUARTER_WORD.match(first) else 4
