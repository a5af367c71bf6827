"""Text that is none: each reason, and what comes near it and stays."""

from __future__ import annotations

import functools

import pytest

from tests.bench.planted_corpus import Maker
from tests.pipelines.data.rules.asked import reason_of

PROSE = Maker(3).text("en", Maker(3).sentences("en", 12))


reason = functools.partial(reason_of, "characters")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, None),
        (Maker(1).junk("base64"), "encoded data"),
        (Maker(1).junk("symbols"), "symbols"),
        (Maker(1).junk("numbers"), "numbers"),
        (Maker(1).junk("mojibake"), "mojibake"),
        ("caf\u00e9 na\u00efve \u00e0 la fa\u00e7on de \u00c9mile \u00ab bon \u00bb " * 20, None),
        ("def f(x):\n    return {k: [v] for k, v in x.items()}\n" * 5, None),
        ("\ufffd" * 10 + PROSE, "mojibake"),
        (Maker(1).junk("gibberish"), "gibberish"),
        ("Angstschwei\u00df twelfths strengths " * 3 + PROSE, None),
        (Maker(1).other_junk("hex dump"), "encoded data"),
        (Maker(1).other_junk("cp1251"), "mojibake"),
        ("= " * 10 + "=" * 60 + PROSE, None),
        ("\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e " * 9, None),
    ],
)
def test_each_reason(text: str, expected: str | None) -> None:
    assert reason(text) == expected
