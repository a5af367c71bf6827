"""Cleaning keeps what a reader sees; the normal form for duplicates ignores what a reader does not."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.clean import clean, words


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("cafe\u0301", "caf\u00e9"),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("tab\tstays", "tab\tstays"),
        ("bell\x07, escape\x1b[0m, nul\x00, delete\x7f, c1\x9b", "bell, escape[0m, nul, delete, c1"),
        ("\ufeffmark", "mark"),
        ("\ufb01ne print \u2460", "\ufb01ne print \u2460"),
    ],
)
def test_clean_fixes_exactly_this(dirty: str, expected: str) -> None:
    assert clean(dirty) == expected


@given(st.text())
def test_clean_is_idempotent_and_leaves_normalised_text_without_controls(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert not [c for c in once if unicodedata.category(c) == "Cc" and c not in "\n\t"]


@given(st.text(alphabet=st.characters(codec="ascii", exclude_categories=["Cc"])))
def test_plain_text_is_left_alone(text: str) -> None:
    assert clean(text) == text


@pytest.mark.parametrize(
    "disguised",
    [
        "TO BE, or not to be!",
        "to\u200b be o\u00adr n\u200dot to be",
        "\uff54\uff4f be or not to be",
        "t\u043e b\u0435 \u043er n\u043et to b\u0435",
        "to  be\n\nor -- not -- to be",
    ],
)
def test_invisible_and_lookalike_noise_does_not_hide_a_copy(disguised: str) -> None:
    assert words(disguised) == ["to", "be", "or", "not", "to", "be"]


@given(st.text(alphabet=st.characters(codec="ascii")))
def test_the_fast_path_for_ascii_gives_the_words_of_the_general_path(text: str) -> None:
    assert words(text) == words(text + " \u00e9")[:-1]
