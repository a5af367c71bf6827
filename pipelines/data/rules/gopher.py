"""The quality rules of Gopher (Rae et al. 2021, appendix A): lengths of texts and words, symbols, lines, stop words.

What counts words is not asked of scripts that put no spaces between them.
"""

from __future__ import annotations

from pydantic import Field

from pipelines.data.rules import base
from pipelines.data.rules.base import Page, RuleConfig

_BULLETS = ("-", "*", "\u2022", "\u2023", "\u25cf", "\u25e6", "\u00b7")
_ELLIPSES = ("...", "\u2026")


class GopherConfig(RuleConfig):
    """The thresholds of the paper."""

    min_words: int = Field(50, ge=1, description="Fewest words.")
    max_words: int = Field(100_000, ge=1, description="Most words.")
    min_word_length: float = Field(3.0, gt=0, description="Least mean length of a word, in characters.")
    max_word_length: float = Field(10.0, gt=0, description="Greatest mean length of a word, in characters.")
    max_symbol_words: float = Field(0.1, ge=0, le=1, description="Most hash signs, and most ellipses, for each word.")
    max_bullet_lines: float = Field(0.9, ge=0, le=1, description="Largest share of lines that start with a bullet.")
    max_ellipsis_lines: float = Field(0.3, ge=0, le=1, description="Largest share of lines that end with an ellipsis.")
    min_alphabetic: float = Field(0.8, ge=0, le=1, description="Least share of words with a letter.")
    stop_words: tuple[str, ...] = Field(
        ("the", "be", "to", "of", "and", "that", "have", "with"),
        description="Words of which a text has `min_stop_words`; none for texts in other languages than English.",
    )
    min_stop_words: int = Field(2, ge=0, description="Occurrences of stop words.")


class Rule(base.Rule):
    """Gopher's quality rules."""

    Config = GopherConfig

    def reason(self, page: Page) -> str | None:
        """Return the first rule that a text breaks."""
        return self._lines(page) or (self._words(page) if page.spaced else None)

    def _lines(self, page: Page) -> str | None:
        lines, bounds = page.lines, self.settings
        if sum(line.startswith(_BULLETS) for line in lines) > bounds.max_bullet_lines * len(lines):
            return "gopher: bullets"
        if sum(line.endswith(_ELLIPSES) for line in lines) > bounds.max_ellipsis_lines * len(lines):
            return "gopher: ellipses"
        return None

    def _words(self, page: Page) -> str | None:
        words, bounds = page.words, self.settings
        count = len(words)
        if not bounds.min_words <= count <= bounds.max_words:
            return "gopher: length"
        if not bounds.min_word_length <= sum(map(len, words)) / count <= bounds.max_word_length:
            return "gopher: word length"
        if max(page.text.count("#"), *(page.text.count(mark) for mark in _ELLIPSES)) > bounds.max_symbol_words * count:
            return "gopher: symbols"
        if sum(any(map(str.isalpha, word)) for word in words) < bounds.min_alphabetic * count:
            return "gopher: not alphabetic"
        wanted = set(bounds.stop_words)
        if wanted and sum(word.lower() in wanted for word in words) < bounds.min_stop_words:
            return "gopher: stop words"
        return None
