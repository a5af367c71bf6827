"""Phrases that a text repeats, after Gopher (Rae et al. 2021, table A1): search-engine pages and loops of a generator.

The share of a text that its most frequent run of 2, 3 and 4 words takes. Lines and runs of 10 words that repeat are
looked at in every document, by `prepare.max_repeated_lines` and `max_repeated_ngrams`.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from pipelines.data.rules import base
from pipelines.data.rules.base import Page, RuleConfig
from pipelines.data.shingles import word_runs


class RepetitionConfig(RuleConfig):
    """The largest shares."""

    max_top_2: float = Field(0.20, gt=0, le=1, description="Of the most frequent run of 2 words.")
    max_top_3: float = Field(0.18, gt=0, le=1, description="Of the most frequent run of 3 words.")
    max_top_4: float = Field(0.16, gt=0, le=1, description="Of the most frequent run of 4 words.")
    min_distinct: float = Field(
        0.0, ge=0, le=1, description="Least share of different words among the first 200; 0 asks nothing."
    )


class Rule(base.Rule):
    """Top runs of words."""

    Config = RepetitionConfig

    def reason(self, page: Page) -> str | None:
        """Return the shortest run that takes too much of a text."""
        units, bounds = page.units, self.settings
        count = len(units.hashes)
        if count < 20:
            return None
        for size, bound in ((2, bounds.max_top_2), (3, bounds.max_top_3), (4, bounds.max_top_4)):
            runs, ends = word_runs(units, size)
            if not len(runs):
                continue
            _, first, times = np.unique(runs, return_index=True, return_counts=True)
            most = int(times.argmax())
            if times[most] > 2 and times[most] * (ends[first[most]] - first[most]) > bound * count:
                return f"repetition: {size} words"
        head = units.hashes[:200]
        return "repetition: few words" if len(np.unique(head)) < bounds.min_distinct * len(head) else None
