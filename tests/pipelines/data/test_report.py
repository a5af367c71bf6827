"""The report: the counts add up, and the table shows them per source."""

from __future__ import annotations

import dataclasses
import random

from pipelines.data.records import Document
from pipelines.data.report import DocumentCounts, losses
from pipelines.data.split import SPLITS


def counted() -> DocumentCounts:
    rng = random.Random(0)
    counts = DocumentCounts()
    for _ in range(500):
        source = rng.choice(["a", "b", "c"])
        document = Document("id", "x" * rng.randrange(100), source, f"licence of {source}", "work")
        counts.read(document)
        if rng.random() < 0.3:
            counts.drop(document, rng.choice(["too short", "near duplicate"]))
        elif rng.random() < 0.1 and len(document.text) > 20:
            counts.cut(document, "contaminated", 20, document.text[:20])
            counts.keep(dataclasses.replace(document, text=document.text[20:]), "train")
        else:
            counts.keep(document, rng.choice(SPLITS))
    return counts


def test_read_is_kept_plus_dropped_for_every_source() -> None:
    report = counted().to_json()
    for name, source in report["sources"].items():
        kept = sum(split[name]["documents"] for split in report["splits"].values())
        assert source["kept"] == kept
        assert source["read"] == kept + sum(source["dropped"].values())
    assert sum(source["read"] for source in report["sources"].values()) == 500


def test_totals_per_split_equal_the_sums_over_sources() -> None:
    counts = counted()
    report = counts.to_json()
    for split in SPLITS:
        assert counts.documents(split) == sum(s["documents"] for s in report["splits"][split].values())
        assert counts.bytes(split) == sum(s["bytes"] for s in report["splits"][split].values())


def test_every_byte_that_was_read_is_kept_dropped_or_cut() -> None:
    report = counted().to_json()
    for name, source in report["sources"].items():
        kept = sum(split[name]["bytes"] for split in report["splits"].values())
        lost = sum(source["dropped_bytes"].values()) + sum(source["cut_bytes"].values())
        assert source["read_bytes"] == kept + lost
    table = losses(report)
    assert sum(row["bytes"] for row in table) == sum(counted().lost_bytes().values())
    assert [row["bytes"] for row in table] == sorted((row["bytes"] for row in table), reverse=True)


def test_each_reason_has_samples_the_same_for_the_same_documents() -> None:
    samples = counted().to_json()["samples"]
    assert {reason: len(found) for reason, found in samples.items()} == {
        "contaminated": 5,
        "near duplicate": 5,
        "too short": 5,
    }
    assert samples == counted().to_json()["samples"]
