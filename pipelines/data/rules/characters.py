"""Text that is none, by its characters: encoded data, symbols, numbers, letters that spell nothing, wrong encodings.

Nothing here depends on a language, so it is on for every source. Thresholds are far from prose, verse and code.
"""

from __future__ import annotations

import re

import regex
from pydantic import Field

from pipelines.data.clean import INVISIBLE
from pipelines.data.rules import base
from pipelines.data.rules.base import Page, RuleConfig

_UNBROKEN = re.compile(r"[A-Za-z0-9+/=_\-]{40,}")
_LONG = 40
_LETTERS = re.compile(r"[A-Za-z]{40,}|[-=_]{40,}")
_HEX_LENGTHS = {2, 4, 8, 16}
_A_TO_F = re.compile(r"\b(?:\d[a-f]|[a-f]\d)\b", re.IGNORECASE)
_SHOWN_BYTES = (
    "\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d"
    "\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\u017e\u0178"
)
_MOJIBAKE = re.compile(rf"[\u00c2-\u00f4](?:[\u0080-\u00bf{_SHOWN_BYTES}])")
"""A lead byte of UTF-8 and a byte that continues it, as Windows-1252 shows them."""
_HIGH = re.compile("[\u00c0-\u00ff]")
_LETTER = re.compile(r"[^\W\d_]")
"""Most letters of no language are accented Latin ones: Cyrillic, Greek or Thai read as Latin-1 is nothing else."""
_HEX = re.compile(r"(?=[a-f]*\d)(?:[0-9a-f]{2})+", re.IGNORECASE)
_LATIN = re.compile(r"\b[A-Za-z]{5,}\b")
_UNSPELLED = re.compile(r"[bcdfghjklmnpqrstvwxz]{5}", re.IGNORECASE)
_FEWEST_SPELLED = 30
_SPELLED = 5000
"""Characters from the start whose words are looked at."""
_MARKS = regex.compile(r"\p{M}")
_ALNUM = bytes(range(48, 58)) + bytes(range(65, 91)) + bytes(range(97, 123))
_DIGITS = bytes(range(48, 58))
_BLANKS = b" \t\n"
_LOOKED_AT = 50_000
"""Characters from the start that are counted; a document is judged by them."""


class CharactersConfig(RuleConfig):
    """How much of a text may be something else."""

    max_encoded: float = Field(
        0.3, gt=0, le=1, description="Share of the characters in unbroken runs of 40 or more, as base64 has them."
    )
    max_symbols: float = Field(
        0.5, gt=0, le=1, description="Share of the characters, blanks aside, that are neither letter nor digit."
    )
    max_digits: float = Field(0.75, gt=0, le=1, description="Share of the characters, blanks aside, that are digits.")
    max_mojibake: float = Field(
        0.02, gt=0, le=1, description="Share of the characters in pairs that UTF-8 makes when it is read as Latin-1."
    )
    max_unspelled: float = Field(
        0.3,
        gt=0,
        le=1,
        description="Share of the different Latin words, of 30 or more, that have five letters in a row and no vowel.",
    )
    max_replaced: float = Field(0.005, gt=0, le=1, description="Share of replacement characters (U+FFFD).")


class Rule(base.Rule):
    """Encoded data, symbols, numbers, mojibake."""

    Config = CharactersConfig

    def reason(self, page: Page) -> str | None:
        """Return which of them a text is."""
        text, bounds = page.text[:_LOOKED_AT], self.settings
        if not text:
            return None
        if _encoded(text) > bounds.max_encoded * len(text):
            return "encoded data"
        if not text.isascii():
            if 2 * len(_HIGH.findall(text)) > len(_LETTER.findall(text)):
                return "mojibake"
            if text.count("\ufffd") > bounds.max_replaced * len(text):
                return "mojibake"
            if 2 * len(_MOJIBAKE.findall(text)) > bounds.max_mojibake * len(text):
                return "mojibake"
        if _is_gibberish(text, bounds.max_unspelled):
            return "gibberish"
        letters, digits, total = _counted(text)
        if total - letters > bounds.max_symbols * total:
            return "symbols"
        return "numbers" if digits > bounds.max_digits * total else None


def _is_gibberish(text: str, most: float) -> bool:
    """Return whether too many of the first different Latin words cannot be spoken: hands on a keyboard, ciphers."""
    words = set(_LATIN.findall(text, 0, _SPELLED))  # a manual page repeats the name of its program
    return len(words) >= _FEWEST_SPELLED and sum(map(bool, map(_UNSPELLED.search, words))) > most * len(words)


def _encoded(text: str) -> int:
    """Return the characters in unbroken runs that are not letters alone, or in words of a hex dump."""
    words = text.split()
    numbers = sum(len(word) + 1 for word in words if len(word) in _HEX_LENGTHS and _HEX.fullmatch(word))
    if 2 * numbers > len(text) and not text.isdigit() and _A_TO_F.search(text):
        return numbers
    if max(map(len, words), default=0) < _LONG:
        return 0
    runs = (run for word in words if len(word) >= _LONG for run in _UNBROKEN.findall(word))
    return sum(len(run) for run in runs if not _LETTERS.fullmatch(run))


def _counted(text: str) -> tuple[int, int, int]:
    """Return letters and digits (marks included), digits, and all characters but blanks."""
    if text.isascii():
        seen = text.encode().translate(None, _BLANKS)
        return len(seen) - len(seen.translate(None, _ALNUM)), len(seen) - len(seen.translate(None, _DIGITS)), len(seen)
    solid = INVISIBLE.sub("", "".join(text.split()))
    marks = len(_MARKS.findall(solid))
    return sum(map(str.isalnum, solid)) + marks, sum(map(str.isdigit, solid)), len(solid)
