"""Held-out text in the training text: counted as a search of strings counts it, reported, refused above a bound."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.core.errors import DataRefused
from pipelines.data import contamination, document_files
from pipelines.data.contamination import WORDS, measure, runs_of
from pipelines.data.records import Document
from pipelines.evaluation import items

Records = list[dict[str, Any]]


def documents(*texts: str) -> list[Document]:
    return [Document(id=str(n), text=text, source="s", license="l", work="") for n, text in enumerate(texts)]


def random_text(words: int, seed: int, vocabulary: int = 3) -> str:
    """Few words, so that runs coincide by chance now and then."""
    return " ".join(f"w{n}" for n in np.random.default_rng(seed).integers(0, vocabulary, words))


def by_strings(train: list[Document], held: list[Document]) -> list[tuple[int, int]]:
    """(runs, shared runs) of each held-out document, by looking each run up as a tuple of words."""

    def runs(text: str) -> list[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return [tuple(words[n : n + WORDS]) for n in range(len(words) - WORDS + 1)]

    known = {run for document in train for run in runs(document.text)}
    return [(len(found := runs(d.text)), sum(run in known for run in found)) for d in held]


def test_counts_are_those_of_a_search_by_strings() -> None:
    """Two letters' worth of text: long runs coincide by chance, in some documents and not in others."""
    train = documents(*(random_text(3000, seed, vocabulary=2) for seed in range(3)))
    held = documents(*(random_text(60 + 40 * seed, 100 + seed, vocabulary=2) for seed in range(6)))
    expected = by_strings(train, held)
    assert 0 < sum(shared for _, shared in expected) < sum(runs for runs, _ in expected)
    found = measure(train, {"test": held})["splits"]["test"]
    assert (found["runs"], found["shared"]) == tuple(map(sum, zip(*expected, strict=True)))
    assert {one["id"]: (one["runs"], one["shared"]) for one in found["worst"]} == {
        held[n].id: pair for n, pair in enumerate(expected) if pair[1]
    }
    assert found["documents"] == sum(shared > 0 for _, shared in expected)
    assert found["copied"] == sum(shared >= runs / 2 for runs, shared in expected)


def test_a_quotation_is_found_whatever_its_case_and_punctuation() -> None:
    quoted = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer"
    train = documents("He said: " + quoted.upper().replace(",", " --") + " and left the room to all the others in it.")
    clean = "An entirely different sentence of more than thirteen words stands here so that there is one."
    found = measure(train, {"test": documents("Before it. " + quoted + " After it.", clean)})["splits"]["test"]
    assert found["documents"] == 1
    assert found["worst"][0]["id"] == "0"
    assert found["shared"] == len(runs_of(quoted)) == 18 + 1 - WORDS


@pytest.mark.parametrize("length", [1, WORDS - 1, WORDS])
def test_a_text_of_fewer_words_than_a_run_has_none(length: int) -> None:
    """Equal short texts say nothing: "Chapter 1" stands in many books."""
    text = " ".join(["word"] * length)
    found = measure(documents(text), {"test": documents(text)})
    assert found["share"] == float(length == WORDS)
    assert found["splits"]["test"]["runs"] == int(length == WORDS)


def test_nothing_held_out_and_nothing_to_learn_from_share_nothing() -> None:
    assert measure(documents(random_text(50, 1)), {"test": [], "validation": []})["share"] == 0.0
    alone = measure([], {"test": documents(random_text(50, 1))})
    assert alone["splits"]["test"] == {"runs": 38, "shared": 0, "share": 0.0, "documents": 0, "copied": 0, "worst": []}


def test_the_worst_documents_come_first_and_are_few() -> None:
    passage = random_text(40, 1007, vocabulary=1000)
    held = documents(*(passage + " " + random_text(10 * n, n, vocabulary=1000) for n in range(30)))
    worst = measure(documents(passage), {"test": held})["splits"]["test"]["worst"]
    assert [one["id"] for one in worst] == [str(n) for n in range(10)]


HALVES = {"validation_fraction": 0.25, "test_fraction": 0.25}


@pytest.fixture
def planted(
    tmp_path: Path,
    make_documents: Callable[..., Records],
    write_shard: Callable[..., Path],
    prepare: Callable[..., Path],
) -> Callable[..., Path]:
    """Prepare a corpus in which every tenth document, far from a duplicate, quotes the same sixty words."""

    def run(**settings: Any) -> Path:
        records = make_documents(120, words=400)
        passage = " ".join(records[0]["text"].split()[:60])
        for record in records[::10]:
            record["text"] += "\n" + passage
        return prepare(write_shard(tmp_path / "corpus" / "a.jsonl", records).parent, **HALVES, **settings)

    return run


def kept(folder: Path) -> dict[str, list[Document]]:
    names = ("train", "validation", "test")
    return {name: list(document_files.documents(folder / "documents" / f"{name}.jsonl.zst")) for name in names}


def reported(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


def test_the_stage_cuts_a_passage_that_both_sides_quote_from_the_training_text(planted: Callable[..., Path]) -> None:
    folder = planted(repeated_passages={"words": 0})
    found, documents = reported(folder), kept(folder)
    assert found["contamination"]["share"] > 0.005
    assert sum(one["documents"] for one in found["contamination"]["splits"].values()) > 0
    removed = found["contamination"]["removed"]
    assert (removed["action"], removed["documents"] + removed["cut"]) == ("passage", len(removed["samples"]))
    for split in ("validation", "test"):
        assert sum(shared for _, shared in by_strings(documents["train"], documents[split])) == 0
    counted = [(s["cut_bytes"], s["dropped_bytes"]) for s in found["sources"].values()]
    assert sum(c.get("contaminated", 0) + d.get("contaminated", 0) for c, d in counted) == removed["bytes"] > 0


def test_the_stage_drops_whole_documents_when_told_so(planted: Callable[..., Path]) -> None:
    folder = planted(repeated_passages={"words": 0}, contamination={"action": "document"})
    removed = reported(folder)["contamination"]["removed"]
    assert removed["cut"] == 0 < removed["documents"]
    texts = {d.text for d in kept(planted(repeated_passages={"words": 0}, contamination={"action": "refuse"}))["train"]}
    assert {d.text for d in kept(folder)["train"]} < texts


def test_a_passage_that_documents_repeat_stays_in_the_first_of_them_alone(planted: Callable[..., Path]) -> None:
    folder = planted(repeated_passages={"words": 30})
    documents = [document for side in kept(folder).values() for document in side]
    first = next(document for document in documents if document.id == "d0-0")
    passage = " ".join(first.text.split()[:60])
    assert [document.id for document in documents if passage in document.text] == ["d0-0"]
    assert sum(source["cut"].get("repeated passages", 0) for source in reported(folder)["sources"].values()) == 11
    assert reported(folder)["contamination"]["share"] == 0.0


def test_the_stage_refuses_more_than_it_was_told_to_bear_and_names_the_documents(planted: Callable[..., Path]) -> None:
    with pytest.raises(DataRefused, match="of the held-out 13-word runs also stand in the training text") as caught:
        planted(contamination={"action": "refuse", "max_share": 0.001}, repeated_passages={"words": 0})
    assert "prepare.contamination.max_share is 0.10%; most in " in caught.value.message
    assert "set prepare.contamination.action to `passage` or `document`" in str(caught.value)
    assert caught.value.exit_code == 8


def test_the_bundled_corpus_holds_next_to_nothing_in_common(bundled: Path) -> None:
    """Micah 4 quotes Isaiah 2, and Python's tutorial repeats listings: 0.02 % in all."""
    report = json.loads((bundled / "report.json").read_text(encoding="utf-8"))["contamination"]
    assert 0 < report["share"] < 0.0005
    assert all(found["copied"] == 0 for found in report["splits"].values())
    assert report["splits"]["test"]["worst"][0]["id"] == "bible/micah/004"


def test_items_of_the_tasks_are_cut_from_the_test_split_so_its_share_covers_them(bundled: Path) -> None:
    test = list(document_files.documents(bundled / "documents" / "test.jsonl.zst"))
    text = " ".join(" ".join(document.text for document in test).split())
    made = [*items.next_line(test, 40, 5), *items.cloze(test, 40, 5)]
    assert made
    for item in made:
        for part in (str(item["context"]), *map(str, item["choices"])):
            assert " ".join(part.split()) in text
    assert contamination.runs_of(text).size > 10_000
