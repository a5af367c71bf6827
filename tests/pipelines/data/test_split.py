"""Splits: groups stay whole, sides are stable as a corpus grows, and no split is ever empty."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.core.errors import IntegrityError
from pipelines.data import document_files
from pipelines.data.config import PrepareConfig
from pipelines.data.split import SPLITS, assign, group_names

CONFIG = PrepareConfig()


@given(st.sets(st.text(min_size=1), min_size=3, max_size=40), st.integers(0, 2**32 - 1))
def test_every_split_gets_a_group_and_every_group_one_split(groups: set[str], seed: int) -> None:
    sides = assign(groups, CONFIG.model_copy(update={"seed": seed}))
    assert sides.keys() == groups
    assert set(sides.values()) == set(SPLITS)


@pytest.mark.parametrize("groups", [[], ["a"], ["a", "b", "a"]])
def test_fewer_than_three_groups_cannot_be_split(groups: list[str]) -> None:
    with pytest.raises(IntegrityError, match="train, validation and test need one each"):
        assign(groups, CONFIG)


def test_the_fractions_are_met_on_many_groups() -> None:
    config = PrepareConfig(validation_fraction=0.1, test_fraction=0.2)
    counts = Counter(assign((f"g{n}" for n in range(5000)), config).values())
    assert counts["test"] / 5000 == pytest.approx(0.2, abs=0.02)
    assert counts["validation"] / 5000 == pytest.approx(0.1, abs=0.02)


def test_a_group_keeps_its_side_when_the_corpus_grows() -> None:
    before = assign((f"g{n}" for n in range(500)), CONFIG)
    after = assign((f"g{n}" for n in range(1000)), CONFIG)
    assert {group: after[group] for group in before} == before


def test_a_held_out_side_is_bounded_and_what_is_more_trains() -> None:
    groups, config = [f"g{n}" for n in range(400)], PrepareConfig(max_held_out_characters=1000)
    whole = assign(groups, config.model_copy(update={"max_held_out_characters": None}), dict.fromkeys(groups, 300))
    bounded = assign(groups, config, dict.fromkeys(groups, 300))
    assert Counter(bounded.values())["test"] == Counter(bounded.values())["validation"] == 3
    assert all(whole[group] == side for group, side in bounded.items() if side != "train"), "the others come back"
    assert whole == assign(groups, PrepareConfig()) == assign(groups, PrepareConfig(), dict.fromkeys(groups, 300))
    huge = assign(groups, config, dict.fromkeys(groups, 10**6))
    assert Counter(huge.values())["test"] == Counter(huge.values())["validation"] == 1, "one work at least"


def test_another_seed_gives_another_split() -> None:
    groups = [f"g{n}" for n in range(200)]
    assert assign(groups, CONFIG) != assign(groups, CONFIG.model_copy(update={"seed": 1}))


def test_works_that_share_a_copy_are_one_group_also_through_a_third() -> None:
    groups = group_names(["d", "c", "b", "a", "e"], [("a", "c"), ("c", "d"), ("b", "b")])
    assert groups == {"a": "a", "b": "b", "c": "a", "d": "a", "e": "e"}


@pytest.fixture(scope="module")
def sides(bundled: Path) -> dict[str, list[document_files.Document]]:
    return {split: list(document_files.documents(bundled / "documents" / f"{split}.jsonl.zst")) for split in SPLITS}


def test_no_work_of_the_bundled_corpus_straddles_a_split(sides: dict[str, list[document_files.Document]]) -> None:
    splits_of = defaultdict(set)
    for split, documents in sides.items():
        for document in documents:
            splits_of[document.work].add(split)
    assert {work: s for work, s in splits_of.items() if len(s) > 1} == {}


def test_the_folio_text_of_a_held_out_play_is_held_out_with_it(sides: dict[str, list[document_files.Document]]) -> None:
    held_out = {d.work for s in ("validation", "test") for d in sides[s] if d.source == "shakespeare-modern"}
    folio = {d.work for s in ("validation", "test") for d in sides[s] if d.source == "shakespeare-folio"}
    assert folio
    assert folio <= held_out
    assert not {d.work for d in sides["train"]} & (held_out | folio)


def test_no_document_of_the_bundled_corpus_is_in_two_splits(sides: dict[str, list[document_files.Document]]) -> None:
    texts = {split: {document.text for document in documents} for split, documents in sides.items()}
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_bundled_corpus_holds_out_three_to_four_percent_of_every_kind(
    sides: dict[str, list[document_files.Document]], split: str
) -> None:
    total = sum(len(d.text.encode()) for documents in sides.values() for d in documents)
    held = sum(len(d.text.encode()) for d in sides[split])
    assert 0.03 <= held / total <= 0.042
    assert {d.source for d in sides[split]} >= {"bible-kjv", "python-docs", "shakespeare-modern"}


def test_the_test_split_holds_one_text_of_each_work(sides: dict[str, list[document_files.Document]]) -> None:
    """Two texts of one play would be counted as two pieces of evidence."""
    sources = defaultdict(set)
    for document in sides["test"]:
        sources[document.work].add(document.source)
    assert {work: s for work, s in sources.items() if len(s) > 1} == {}
