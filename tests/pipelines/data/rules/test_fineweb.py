"""FineWeb: lines that end, are long enough and differ."""

from __future__ import annotations

import functools

import pytest

from tests.bench.planted_corpus import Maker
from tests.pipelines.data.rules.asked import reason_of

PROSE = Maker(3).text("en", Maker(3).sentences("en", 12))


reason = functools.partial(reason_of, "fineweb")


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
