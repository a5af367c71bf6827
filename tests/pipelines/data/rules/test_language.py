"""Languages, offline: what stays, what goes, and what is too short to tell."""

from __future__ import annotations

import pytest

from pipelines.data.rules import registry
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
