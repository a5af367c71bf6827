"""Items in running text: the distance by its definition, and recall of items that were changed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.approximate import ItemIndex, best_match
from pipelines.data.shingles import units_of
from tests.bench.planted_corpus import LEXICONS, Maker

LETTERS = st.lists(st.integers(0, 2), max_size=12)


@given(LETTERS.filter(bool), LETTERS)
def test_the_best_match_is_that_of_the_table_of_all_distances(pattern: list[int], text: list[int]) -> None:
    row = [0] * (len(text) + 1)
    for number, symbol in enumerate(pattern, start=1):
        above, row = row, [number]
        for place, other in enumerate(text):
            row.append(min(above[place + 1] + 1, row[-1] + 1, above[place] + (symbol != other)))
    assert best_match(pattern, text) == (min(row), row.index(min(row)))


@pytest.mark.parametrize("language", LEXICONS)
def test_items_are_found_verbatim_and_edited_and_nothing_else_is(language: str) -> None:
    maker = Maker(11)
    items = [maker.words(language, random.Random(n).randrange(8, 40)) for n in range(40)]
    index = ItemIndex([units_of(maker.text(language, [item])) for item in items])
    for share, number, item in [(share, n, item) for share in (0.0, 0.1) for n, item in enumerate(items)]:
        words = maker.changed(item, language, share) if share else item
        page = [*maker.sentences(language, 5), words, *maker.sentences(language, 5)]
        assert number in {hit.item for hit in index.find(units_of(maker.text(language, page)).hashes)}
    clean = [units_of(maker.text(language, maker.sentences(language, 20))).hashes for _ in range(40)]
    assert sum(bool(index.find(hashes)) for hashes in clean) == 0


def test_a_short_item_must_stand_as_it_is() -> None:
    index = ItemIndex([units_of("who wrote this book")])
    assert [(h.start, h.end) for h in index.find(units_of("he asked who wrote this book twice").hashes)] == [(2, 6)]
    assert index.find(units_of("he asked who wrote that book twice").hashes) == []
    assert ItemIndex([]).find(units_of("a b c").hashes) == []
