"""Generated items: true answers, fair distractors, nothing but the seed decides."""

from __future__ import annotations

from collections import Counter

import pytest

from pipelines.core.artifact import Artifact
from pipelines.evaluation import items
from pipelines.measure import heldout
from pipelines.measure.heldout import Document


@pytest.fixture(scope="module")
def documents(prepared: Artifact) -> tuple[Document, ...]:
    return heldout.load(prepared.path).documents


def test_the_labelled_line_is_the_one_that_follows(documents: tuple[Document, ...]) -> None:
    for item in items.next_line(documents, 40, 0):
        true = item["choices"][item["label"]]
        last = item["context"].splitlines()[-1]
        homes = [items.lines_of(d.text) for d in documents if true in d.text]
        assert any(lines[i] == true and lines[i - 1].endswith(last) for lines in homes for i in range(1, len(lines))), (
            item
        )


def test_wrong_lines_are_different_similar_in_length_and_of_the_same_source(documents: tuple[Document, ...]) -> None:
    made = items.next_line(documents, 40, 0)
    assert len(made) == 40
    for item in made:
        assert len(set(item["choices"])) == 4
        true = item["choices"][item["label"]]
        sources = {d.source for d in documents if true in items.lines_of(d.text)}
        for wrong in item["choices"]:
            assert sources & {d.source for d in documents if wrong in items.lines_of(d.text)}
    spread = [max(map(len, i["choices"])) - min(map(len, i["choices"])) for i in made]
    assert sorted(spread)[20] <= 12


def test_length_alone_does_not_give_the_line_away(documents: tuple[Document, ...]) -> None:
    """The null that a multiple choice must survive: always take the longest, or the shortest."""
    made = items.next_line(documents, 100, 0) + items.cloze(documents, 100, 0)
    for pick in (max, min):
        right = sum(pick(i["choices"], key=len) == i["choices"][i["label"]] for i in made)
        # Chance is 1/4; four standard errors on either side.
        assert abs(right / len(made) - 0.25) < 4 * (0.25 * 0.75 / len(made)) ** 0.5


def test_labels_are_spread_evenly(documents: tuple[Document, ...]) -> None:
    made = items.next_line(documents, 100, 0) + items.cloze(documents, 100, 0)
    counts = Counter(item["label"] for item in made)
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) / len(made) < 0.4


def test_cloze_asks_for_the_word_that_stands_there(documents: tuple[Document, ...]) -> None:
    made = items.cloze(documents, 40, 0)
    assert len(made) >= 20
    for item in made:
        word = item["choices"][item["label"]]
        assert any(f"{item['context']} {word}" in d.text for d in documents)
        assert len({len(choice) for choice in item["choices"]} | {len(word)}) <= 3
    assert len({item["choices"][item["label"]] for item in made}) == len(made), "each word once"


def test_cloze_words_are_rare(documents: tuple[Document, ...]) -> None:
    words = Counter(w for d in documents for w in items._WORD.findall(d.text))
    for item in items.cloze(documents, 40, 0):
        assert all(2 <= words[choice] <= 20 for choice in item["choices"])


def test_additions_are_right_different_and_balanced_in_length() -> None:
    made = items.addition(90, 0)
    lengths = Counter()
    for item in made:
        left, right = item["context"].removesuffix("=").split("+")
        assert int(left) + int(right) == int(item["answer"])
        lengths[len(left), len(right)] += 1
    assert lengths == {(1, 1): 30, (2, 2): 30, (3, 3): 30}
    assert len({item["context"] for item in made}) == 90
    assert len({item["context"] for item in items.addition(5000, 0)}) == 5000


def test_items_depend_on_seed_and_documents_only(documents: tuple[Document, ...]) -> None:
    for make in (items.next_line, items.word_order, items.cloze):
        assert make(documents, 20, 0) == make(documents, 20, 0)
        assert make(documents, 20, 0) != make(documents, 20, 1)
    assert items.addition(20, 0) != items.addition(20, 1)


def test_word_order_exchanges_two_neighbours_and_nothing_else(documents: tuple[Document, ...]) -> None:
    made = items.word_order(documents, 40, 0)
    assert len(made) == 40
    for item in made:
        right = item["choices"][item["label"]].split()
        assert len(set(item["choices"])) == items.CHOICES
        for wrong in (choice.split() for n, choice in enumerate(item["choices"]) if n != item["label"]):
            (first, second) = (n for n, pair in enumerate(zip(right, wrong, strict=True)) if pair[0] != pair[1])
            assert second == first + 1
            assert (wrong[first], wrong[second]) == (right[second], right[first])
    assert items.word_order(documents, 40, 0)[:10] == items.word_order(documents, 10, 0)


def test_more_items_extend_fewer(documents: tuple[Document, ...]) -> None:
    """So that a longer evaluation contains the shorter one."""
    assert items.next_line(documents, 30, 0)[:10] == items.next_line(documents, 10, 0)
    assert items.cloze(documents, 20, 0)[:10] == items.cloze(documents, 10, 0)


def test_text_without_line_breaks_falls_apart_into_sentences() -> None:
    text = "One is here. Two follows it! Is three next? Yes: and so on."
    assert items.lines_of(text)[:3] == ["One is here.", "Two follows it!", "Is three next?"]
    assert items.lines_of("a\n\n b \nc\nd") == ["a", "b", "c", "d"]


def test_documents_that_give_no_items_give_none() -> None:
    poor = [Document("1", "x y z", "s"), Document("2", "", "s")]
    assert items.next_line(poor, 10, 0) == []
    assert items.word_order(poor, 10, 0) == []
    assert items.cloze(poor, 10, 0) == []
