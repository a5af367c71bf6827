"""Text that surrounds texts: lists of links, notices about cookies, filler.

Nothing here depends on a language or asks lines to end with punctuation, so that verse, manuals and code pass; it is
on for every source. What else pages of the web are asked stands in `c4`, `fineweb` and `gopher`.
"""

from __future__ import annotations

import regex
from pydantic import Field

from pipelines.data.rules import base
from pipelines.data.rules.base import Page, RuleConfig

_FILLER_TEXT = (
    "lorem ipsum dolor sit amet consectetur adipiscing adipisicing elit sed do eiusmod tempor incididunt ut labore et "
    "dolore magna aliqua enim ad minim veniam quis nostrud exercitation ullamco laboris nisi aliquip ex ea commodo "
    "consequat duis aute irure in reprehenderit voluptate velit esse cillum eu fugiat nulla pariatur excepteur sint "
    "occaecat cupidatat non proident sunt culpa qui officia deserunt mollit anim id est laborum"
)
_FILLER = frozenset(_FILLER_TEXT.split())
_WORD = r"[\p{L}\p{M}'\u2019&/-]+"
_ENTRY = regex.compile(rf"[\p{{Lu}}\p{{Lt}}][\p{{L}}\p{{M}}'\u2019&/-]*(?: {_WORD}){{0,2}}(?: ?[\u00bb\u203a>])?")
"""An entry of a menu: up to three words, the first with a capital, and nothing else."""
_BARS = regex.compile(r" *[|\u00b7\u2022] *|^[*+\u2022\u00b7-] +")
_COUNT = regex.compile(r" *\(\d+\)$")
_FEWEST_ENTRIES = 12
_LONG_ENTRY = 60
"""Characters that no entry of a menu has; asked first, because it costs less."""
_FEWEST_NOTICES = 5
_HEAD = 200
"""Words, and lines, from the start that are looked at."""


class BoilerplateConfig(RuleConfig):
    """How much of a text may be of each kind."""

    max_policies: float = Field(
        0.5, gt=0, le=1, description="Share of the lines, of five or more, that speak of cookies, policies and rights."
    )
    max_menu: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of the entries, of twelve or more, that are up to three words from a capital on; an entry "
        "is a line, or what stands between bars or after a bullet.",
    )
    max_filler: float = Field(0.6, gt=0, le=1, description="Share of the words that are those of lorem ipsum.")


class Rule(base.Rule):
    """Notices, menus, filler."""

    Config = BoilerplateConfig

    def reason(self, page: Page) -> str | None:
        """Return which of them a text is."""
        return self._lines(page.lines, page.policy_lines) or self._words(page)

    def _lines(self, lines: list[str], policies: int) -> str | None:
        count = len(lines)
        if count >= _FEWEST_NOTICES and policies > self.settings.max_policies * count:
            return "boilerplate: policies"
        entries = [entry for line in lines[:_HEAD] for piece in _BARS.split(line) if (entry := _COUNT.sub("", piece))]
        if len(entries) >= _FEWEST_ENTRIES:
            short = sum(len(entry) < _LONG_ENTRY and _ENTRY.fullmatch(entry) is not None for entry in entries)
            if short > self.settings.max_menu * len(entries):
                return "boilerplate: menu"
        return None

    def _words(self, page: Page) -> str | None:
        head = [word.lower().strip(".,;:!?\"'()") for word in page.words[:_HEAD]]
        if len(head) >= 20 and sum(word in _FILLER for word in head) > self.settings.max_filler * len(head):
            return "boilerplate: filler"
        return None
