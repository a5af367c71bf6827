"""Gopher: each rule of the paper."""

from __future__ import annotations

import functools

import pytest

from tests.bench.planted_corpus import Maker
from tests.pipelines.data.rules.asked import reason_of

PROSE = Maker(3).text("en", Maker(3).sentences("en", 12))


reason = functools.partial(reason_of, "gopher")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, None),
        ("- " + PROSE.replace(" ", "\n- "), "gopher: bullets"),
        (PROSE.replace(".", "...\n"), "gopher: ellipses"),
        ("the and to be of that", "gopher: length"),
        ("a b c d e f g " * 20, "gopher: word length"),
        ("there and # words " * 30, "gopher: symbols"),
        ("12345 the 6789 and 24680 " * 30, "gopher: not alphabetic"),
        ("haus wasser stadt menschen " * 30, "gopher: stop words"),
        ("\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002" * 20, None),
    ],
)
def test_each_reason(text: str, expected: str | None) -> None:
    assert reason(text) == expected
