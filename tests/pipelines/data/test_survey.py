"""The first pass: order, bounded memory, what is counted, and what ends in the file of cleaned documents."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines.core.errors import IntegrityError
from pipelines.data import document_files
from pipelines.data.config import PrepareConfig
from pipelines.data.records import Document, Quarantined
from pipelines.data.report import DocumentCounts
from pipelines.data.survey import clean_one, survey

CONFIG = PrepareConfig(workers=1, min_characters=20)


def document(number: int, words: int = 50, **fields: str) -> Document:
    """A document that shares no run of words with any other number."""
    text = " ".join(f"w{number}x{position}" for position in range(words))
    return dataclasses.replace(Document(f"d{number}", text, "s", "l", f"work-{number}"), **fields)


def test_the_file_holds_what_was_kept_in_the_order_it_was_read(tmp_path: Path) -> None:
    counts = DocumentCounts()
    records = [document(n) for n in range(40)]
    records.insert(5, document(99, text="short"))
    records.insert(30, document(3, id="copy", work="another"))
    found = survey(records, tmp_path, CONFIG, counts)
    kept = list(document_files.documents(found.documents))
    assert [d.id for d in kept] == [f"d{n}" for n in range(40)]
    assert found.works == [d.work for d in kept]
    assert found.links == [("work-3", "another")]
    assert counts.reasons() == {"exact duplicate": 1, "too short": 1}


def test_the_signatures_on_disk_are_those_of_the_documents(tmp_path: Path) -> None:
    records = [document(n) for n in range(10)]
    found = survey(records, tmp_path, CONFIG, DocumentCounts())
    expected = np.stack([clean_one(record, CONFIG).signature for record in records])
    assert isinstance(found.signatures, np.memmap)
    assert found.signatures.tolist() == expected.tolist()


def test_no_documents_give_an_empty_survey(tmp_path: Path) -> None:
    found = survey([], tmp_path, CONFIG, DocumentCounts())
    assert found.signatures.shape == (0, CONFIG.permutations)
    assert (found.works, found.links, found.quarantined) == ([], [], 0)
    assert list(document_files.documents(found.documents)) == []


def long(number: int) -> Document:
    """A document of 50 KB in few words, so that hashing it takes no time."""
    return document(number, text=" ".join(f"{number}-{position}-" + "x" * 500 for position in range(100)))


def test_texts_pass_through_memory_and_do_not_stay(tmp_path: Path) -> None:
    total = 0

    def stream() -> Iterator[Document]:
        nonlocal total
        for number in range(600):
            one = long(number)
            total += len(one.text)
            yield one

    tracemalloc.start()
    survey(stream(), tmp_path, CONFIG, DocumentCounts())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 30_000_000
    assert peak < 6_000_000


def test_workers_never_run_far_ahead_of_what_is_written(tmp_path: Path) -> None:
    """Back-pressure: at most a few batches are read beyond the last document that was handled."""
    pulled, handled, ahead = 0, 0, []

    def stream() -> Iterator[Document]:
        nonlocal pulled
        for number in range(200):
            pulled += 1
            ahead.append(pulled - handled)
            yield long(number)

    class Watching(DocumentCounts):
        def read(self, document: Document) -> None:
            nonlocal handled
            handled += 1
            super().read(document)

    survey(stream(), tmp_path, CONFIG.model_copy(update={"workers": 2}), Watching())
    assert handled == 200
    assert max(ahead) <= 100


@pytest.mark.parametrize(("allowed", "refused"), [(0.0, True), (0.0099, True), (0.0101, False), (1.0, False)])
def test_the_share_of_bad_records_is_compared_with_what_is_allowed(
    tmp_path: Path, allowed: float, refused: bool
) -> None:
    records: list[Document | Quarantined] = [document(n) for n in range(99)]
    records.append(Quarantined("a.jsonl", 100, 12_345, "NUL byte"))
    config = CONFIG.model_copy(update={"max_bad_fraction": allowed})
    if refused:
        with pytest.raises(IntegrityError, match=r"a\.jsonl, line 100, byte 12345: NUL byte"):
            survey(records, tmp_path, config, DocumentCounts())
    else:
        assert survey(records, tmp_path, config, DocumentCounts()).quarantined == 1
    listed = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert listed == [{"shard": "a.jsonl", "line": 100, "offset": 12_345, "reason": "NUL byte"}]


def test_a_document_without_a_work_is_a_work_of_its_own_whatever_its_id() -> None:
    one = clean_one(document(1, work=""), CONFIG).document
    same = clean_one(document(1, work="", id="other id"), CONFIG).document
    different = clean_one(document(2, work=""), CONFIG).document
    assert one.work == same.work != different.work
    assert one.work.startswith("document/")


def test_cleaning_happens_before_everything_that_is_decided_by_the_text() -> None:
    dirty = document(1, text="\x07" * 500 + "cafe\u0301 " * 3)
    cleaned = clean_one(dirty, CONFIG.model_copy(update={"min_characters": 100}))
    assert cleaned.dropped == "too short"
    assert cleaned.document.text == "caf\u00e9 " * 3


def test_progress_is_told_every_five_hundred_documents(tmp_path: Path) -> None:
    told: list[int] = []
    survey((document(n, words=12) for n in range(1200)), tmp_path, CONFIG, DocumentCounts(), told.append)
    assert told == [500, 1000]
