"""C4: each mark of a page that is none."""

from __future__ import annotations

import functools

import pytest

from tests.bench.planted_corpus import Maker
from tests.pipelines.data.rules.asked import reason_of

PROSE = Maker(3).text("en", Maker(3).sentences("en", 12))


reason = functools.partial(reason_of, "c4")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, None),
        ("Lorem ipsum. " + PROSE, "c4: lorem ipsum"),
        ("Please enable JavaScript. " + PROSE, "c4: javascript"),
        ("One. Two", "c4: few sentences"),
        ("Home\nAbout us\nContact\n" * 20, "c4: few sentences"),
        ("We use cookies for all of it.\nAll rights reserved by them.\n" * 5, "c4: policies"),
        ("\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002" * 3, None),
        ("x = {1}. Two of it are three. And four of it. Five is next.", None),
    ],
)
def test_each_reason(text: str, expected: str | None) -> None:
    assert reason(text) == expected
