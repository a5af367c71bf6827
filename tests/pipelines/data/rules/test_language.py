"""Languages, offline: what stays, what goes, and what is too short to tell."""

from __future__ import annotations

import pytest

from pipelines.data.rules import language, registry
from pipelines.data.rules.base import Page
from pipelines.data.shingles import units_of
from tests.bench.planted_corpus import Maker

PROSE = Maker(3).text("en", Maker(3).sentences("en", 12))


def reason(text: str) -> str | None:
    rule = registry.make((registry.settings({"name": "language", "keep": ["en"]}, "0", None),))[0]
    return rule.reason(Page(text, units_of(text)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, None),
        (Maker(3).text("de", Maker(3).sentences("de", 12)), "language: de"),
        (Maker(3).text("zh", Maker(3).sentences("zh", 12)), "language: zh"),
        (Maker(3).text("th", Maker(3).sentences("th", 12)), "language: th"),
        ("...", None),
    ],
)
def test_each_reason(text: str, expected: str | None) -> None:
    assert reason(text) == expected


def test_the_known_codes_are_those_of_the_model() -> None:
    assert set(language._identifier().nb_classes) == language.CODES


@pytest.mark.parametrize(
    ("code", "near"),
    [("english", "'en'"), ("German", "'de'"), ("EN", "'en'"), ("en-US", "'en'"), ("eng", "'en'")],
)
def test_an_unknown_language_is_refused_with_those_that_are_near(code: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"{code!r} is no language that can be told.*\(valid: ace, af") as caught:
        language.LanguageConfig(name="language", keep=("en", code))
    assert f"did you mean {near}" in str(caught.value)
