"""The report: the counts add up, and the table shows them per source."""

from __future__ import annotations

import random

from pipelines.data.records import Document
from pipelines.data.report import DocumentCounts, rows
from pipelines.data.split import SPLITS


def counted() -> DocumentCounts:
    rng = random.Random(0)
    counts = DocumentCounts()
    for _ in range(500):
        source = rng.choice(["a", "b", "c"])
        counts.read(source)
        if rng.random() < 0.3:
            counts.drop(source, rng.choice(["too short", "near duplicate"]))
        else:
            text = "x" * rng.randrange(100)
            counts.keep(Document("id", text, source, f"licence of {source}", "work"), rng.choice(SPLITS))
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


def test_the_table_has_a_row_per_source_and_the_same_columns_in_each() -> None:
    report = counted().to_json()
    table = rows(report)
    assert [row["source"] for row in table] == ["a", "b", "c"]
    assert {tuple(row) for row in table} == {
        ("source", "read", "kept", "near duplicate", "too short", "train bytes", "validation bytes", "test bytes")
    }
    assert sum(row["too short"] for row in table) == sum(
        source["dropped"]["too short"] for source in report["sources"].values()
    )
