"""Passages: segments, cuts, and what an earlier document holds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data import passages
from pipelines.data.clean import words
from pipelines.data.passages import Known, Repeated, covered, cut, fingerprints, of_several, segments
from pipelines.data.records import Document
from pipelines.data.shingles import Units, units_of, window_minima, word_runs


@given(st.text(alphabet="ab. !\n\u3002\u4e2d\u0e01'\u0301", max_size=80))
def test_segments_are_the_text_and_their_units_its_units(text: str) -> None:
    assert "".join(segments(text)) == text
    assert [unit for segment in segments(text) for unit in words(segment)] == words(text)


def test_lines_and_sentences_are_segments() -> None:
    assert segments("One. Two!\nThree 3.5 of it") == ["One. ", "Two!\n", "Three 3.5 of it"]
    assert segments("\u4e00\u3002\u4e8c\u3002") == ["\u4e00\u3002", "\u4e8c\u3002"]


def test_a_cut_takes_whole_sentences() -> None:
    text = "Keep this. Cut all of this. Keep that."
    hit = np.array([False, False, True, True, True, True, False, False])
    assert cut(text, hit, whole=True) == passages.Cut("Keep this. Keep that.", ["Cut all of this. "])
    hit[3] = False
    assert cut(text, hit, whole=True).removed == []
    assert cut(text, hit, whole=False).kept == "Keep this. Keep that."


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 12))
def test_minima_are_those_of_every_window(numbers: list[int], window: int) -> None:
    runs = np.array(numbers, dtype=np.uint64)
    size = min(window, len(numbers))
    expected = sorted({min(numbers[n : n + size]) for n in range(len(numbers) - size + 1)}) if numbers else []
    assert window_minima(runs, window).tolist() == expected


def test_covered_is_the_union_of_runs() -> None:
    assert covered(6, np.array([1, 2]), np.array([3, 4])).tolist() == [False, True, True, True, False, False]


@given(st.lists(st.sampled_from([1, 2, 4]), max_size=40), st.integers(1, 5))
def test_a_run_ends_with_the_unit_that_fills_its_words(quarters: list[int], size: int) -> None:
    units = Units(np.arange(len(quarters), dtype=np.uint64), np.array(quarters, dtype=np.int64))
    expected = []
    for start in range(len(quarters)):
        end = next((e for e in range(start, len(quarters) + 1) if sum(quarters[start:e]) >= 4 * size), None)
        expected += [end] if end is not None else []
    assert word_runs(units, size)[1].tolist() == expected


def test_runs_of_whole_words_have_the_same_numbers_beside_other_scripts() -> None:
    plain = word_runs(units_of("one two three four five"), 3)[0]
    mixed = word_runs(units_of("\u4e2d\u6587 one two three four five"), 3)[0]
    assert set(plain.tolist()) <= set(mixed.tolist())


def document(number: int, text: str, source: str = "s") -> Document:
    return Document(str(number), text, source, "l", "w")


def cuts(documents: list[Document], size: int, *, by_source: bool = False) -> list[str]:
    scopes = [d.source if by_source else "" for d in documents]
    marks = (fingerprints(units_of(d.text), size, scope) for d, scope in zip(documents, scopes, strict=True))
    repeated = Repeated(size, by_source=by_source, suspects=Known(of_several(marks)))
    repeated.learn(documents)
    results = [(d, repeated.cut(d)) for d in documents]
    return [d.text if result is None else result.kept for d, result in results]


PASSAGE = "It was the best of times and it was the worst of times for all of them."
OWN = [
    "Nobody had said a word about that.",
    "Somebody else came later and went away.",
    "There were three of them here.",
]


def test_a_passage_stays_where_it_stands_first() -> None:
    found = cuts([document(n, f"{own} {PASSAGE} {own[::-1]}") for n, own in enumerate(OWN)], 12)
    assert found[0] == f"{OWN[0]} {PASSAGE} {OWN[0][::-1]}"
    assert found[1:] == [f"{own} {own[::-1]}" for own in OWN[1:]]


def test_a_shorter_passage_and_one_of_another_source_are_left_alone() -> None:
    texts = [f"{own} {PASSAGE}" for own in OWN]
    assert cuts([document(n, text) for n, text in enumerate(texts)], 18) == texts
    assert cuts([document(n, text, str(n)) for n, text in enumerate(texts)], 12, by_source=True) == texts


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=40), max_size=5))
def test_no_run_is_left_that_stands_in_two_documents_whole_lines_aside(texts: list[list[str]]) -> None:
    """A line a word, so that every unit can be cut: what is left of two documents shares no run of the first."""
    documents = [document(n, "\n".join(text)) for n, text in enumerate(texts)]
    left = [words(text) for text in cuts(documents, 10)]
    seen: set[tuple[str, ...]] = set()
    for original, rest in zip(texts, left, strict=True):
        runs = {tuple(original[n : n + 10]) for n in range(len(original) - 9)}
        assert (len(rest) == len(original)) == (not runs & seen)
        seen |= runs
