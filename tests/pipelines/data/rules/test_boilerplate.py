"""Menus, notices, filler; and what looks like them and is none."""

from __future__ import annotations

import functools

import pytest

from tests.bench.planted_corpus import KINDS, Maker
from tests.pipelines.data.rules.asked import reason_of

VERSE = "\n".join(["Tiger, tiger, burning bright", "In the forests of the night,", "What immortal hand or eye"] * 5)
CODE = "\n".join(f"def step_{n}(state):\n    return state + {n}" for n in range(20))
NAMES = ["Home", "About us", "Press Releases", "Jobs"]
COOKIE_TEXT = "A cookie is sent back by the browser. " * 4

reason = functools.partial(reason_of, "boilerplate")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (Maker(3).text("en", Maker(3).sentences("en", 12)), None),
        (VERSE, None),
        (CODE, None),
        (COOKIE_TEXT, None),  # one line: prose about cookies
        ("\n".join([*NAMES] * 3), "boilerplate: menu"),
        ("\n".join([*NAMES] * 3 + ["and a line of text."] * 2), None),
        ("\n".join([" | ".join(NAMES)] * 3), "boilerplate: menu"),
        ("\n".join(f"* {name} (3)" for name in NAMES * 3), "boilerplate: menu"),
        ("\n".join(["We use cookies.", "All rights reserved."] * 3), "boilerplate: policies"),
        ("\n".join(["\u00a9 Alle Rechte vorbehalten.", "Datenschutz"] * 3), "boilerplate: policies"),
        ("Lorem ipsum dolor sit amet, " * 10, "boilerplate: filler"),
    ],
)
def test_each_reason(text: str, expected: str | None) -> None:
    assert reason(text) == expected


def test_every_kind_of_planted_junk_breaks_a_default_rule() -> None:
    from pipelines.data.config import PrepareConfig
    from pipelines.data.records import Document
    from pipelines.data.survey import clean_one

    maker, config = Maker(11), PrepareConfig()
    for kind in KINDS:
        for number in range(5):
            document = Document(f"{kind}-{number}", maker.junk(kind), "web", "", "")
            assert clean_one(document, config).dropped, document.text[:200]


def test_no_clean_text_of_seven_languages_breaks_one() -> None:
    from pipelines.data.config import PrepareConfig
    from pipelines.data.records import Document
    from pipelines.data.survey import clean_one
    from tests.bench.planted_corpus import LEXICONS

    maker, config = Maker(12), PrepareConfig()
    texts = [maker.text(language, maker.sentences(language, 8 + n)) for language in LEXICONS for n in range(5)]
    assert [clean_one(Document(str(n), text, "web", "", ""), config).dropped for n, text in enumerate(texts)] == (
        [None] * len(texts)
    )
