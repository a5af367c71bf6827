"""FineWeb: lines that end, are long enough and differ."""

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
                    "name": "fineweb",
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
        ("\n".join(f"{n} and so on with a line of some length" for n in range(30)), "fineweb: lines do not end"),
        ("\n".join(f"Item {n}." for n in range(30)), "fineweb: short lines"),
        ((PROSE + "\n") * 2, "fineweb: repeated lines"),
        ("", None),
    ],
)
def test_each_reason(text: str, expected: str | None) -> None:
    assert reason(text) == expected
