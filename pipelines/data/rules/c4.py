"""The rules of C4 (Raffel et al. 2020) for whole documents: sentences that end, and no mark of an empty page.

C4 cuts lines that end without punctuation or are short; here they only do not count, because a document that stays
is trained on as it was written.
"""

from __future__ import annotations

import regex
from pydantic import Field

from pipelines.data.rules import base
from pipelines.data.rules.base import Page, RuleConfig

_ENDS = tuple(".!?\"'\u2019\u201d\u3002\uff01\uff1f\u300d\u0964\u06d4\u061f\u2026")
_SENTENCE_END = regex.compile(r"[.!?\u3002\uff01\uff1f\u0964\u06d4\u061f]+")
_MARKERS = (
    ("lorem ipsum", "c4: lorem ipsum"),
    ("enable javascript", "c4: javascript"),
    ("javascript is disabled", "c4: javascript"),
    ("javascript must be enabled", "c4: javascript"),
)


class C4Config(RuleConfig):
    """What a page must have."""

    min_sentences: int = Field(3, ge=0, description="Fewest sentences in lines that end with punctuation.")
    min_line_words: int = Field(3, ge=0, description="Words of a line that counts, in scripts with spaces.")
    braces: bool = Field(default=False, description="Drop texts with a curly bracket, which are mostly code.")
    policies: bool = Field(default=True, description="Drop texts of which most lines speak of cookies and policies.")


class Rule(base.Rule):
    """C4's rules."""

    Config = C4Config

    def reason(self, page: Page) -> str | None:
        """Return the first rule that a text breaks."""
        lowered = page.text.lower()
        for marker, reason in _MARKERS:
            if marker in lowered:
                return reason
        if self.settings.braces and "{" in page.text:
            return "c4: braces"
        if self.settings.policies and page.policy_lines > 0.5 * len(page.lines):
            return "c4: policies"
        return "c4: few sentences" if self._sentences(page) < self.settings.min_sentences else None

    def _sentences(self, page: Page) -> int:
        least = self.settings.min_line_words if page.spaced else 0
        whole = (line for line in page.lines if line.endswith(_ENDS) and (not least or len(line.split()) >= least))
        if page.spaced or any("\u3002" in line for line in page.lines):
            return sum(max(len(_SENTENCE_END.findall(line)), 1) for line in whole)
        return self.settings.min_sentences  # Thai and Khmer end sentences with a space
