"""Top runs of words: shares just below and above the bound."""

from __future__ import annotations

import functools

import pytest

from tests.bench.planted_corpus import Maker
from tests.pipelines.data.rules.asked import reason_of

PROSE = Maker(3).text("en", Maker(3).sentences("en", 12))


reason = functools.partial(reason_of, "repetition")


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
