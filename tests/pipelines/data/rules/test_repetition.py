"""Top runs of words: shares just below and above the bound."""

from __future__ import annotations

import pytest

from pipelines.data.rules import registry
from pipelines.data.rules.base import Page
from pipelines.data.shingles import units_of
from tests.bench.planted_corpus import Maker

PROSE = Maker(3).text("en", Maker(3).sentences("en", 12))


def reason(text: str) -> str | None:
    rule = registry.make(
        (
            registry.settings(
                {
                    "name": "repetition",
                },
                "0",
                None,
            ),
        )
    )[0]
    return rule.reason(Page(text, units_of(text)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, None),
        ("buy shoes " * 30, "repetition: 2 words"),
        (" ".join(f"red hot tea w{n}" for n in range(40)), "repetition: 2 words"),
        (" ".join(f"red hot tea a{n} b{n} c{n} d{n} e{n} f{n} g{n} h{n}" for n in range(40)), "repetition: 3 words"),
        ("one two three", None),
    ],
)
def test_each_reason(text: str, expected: str | None) -> None:
    assert reason(text) == expected
