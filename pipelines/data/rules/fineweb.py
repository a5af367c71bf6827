"""The rules that FineWeb adds (Penedo et al. 2024): lines that end, lines that are short, lines that repeat."""

from __future__ import annotations

from pydantic import Field

from pipelines.data.rules import base
from pipelines.data.rules.base import Page, RuleConfig

_ENDS = tuple(".!?\"'\u2019\u201d\u3002\uff01\uff1f\u300d\u0964\u06d4\u061f\u2026")


class FinewebConfig(RuleConfig):
    """The thresholds of the paper."""

    min_ended_lines: float = Field(
        0.12, ge=0, le=1, description="Least share of lines that end with punctuation, in scripts that have it."
    )
    max_short_lines: float = Field(
        0.67, ge=0, le=1, description="Largest share of lines of `short` characters or less."
    )
    short: int = Field(30, ge=1, description="Characters of a short line, half of them where a character is a word.")
    max_repeated: float = Field(0.1, ge=0, le=1, description="Largest share of characters in lines that repeat one.")


class Rule(base.Rule):
    """FineWeb's own rules."""

    Config = FinewebConfig

    def reason(self, page: Page) -> str | None:
        """Return the first rule that a text breaks."""
        lines, bounds = page.lines, self.settings
        if not lines:
            return None
        short = bounds.short if page.spaced else bounds.short // 2
        if page.spaced and sum(line.endswith(_ENDS) for line in lines) < bounds.min_ended_lines * len(lines):
            return "fineweb: lines do not end"
        if sum(len(line) <= short for line in lines) >= bounds.max_short_lines * len(lines):
            return "fineweb: short lines"
        total = sum(map(len, lines))
        if total - sum(map(len, set(lines))) > bounds.max_repeated * total:
            return "fineweb: repeated lines"
        return None
