"""Counts of the prepare stage, per source: documents read, kept and dropped (by reason), bytes and licences kept."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from pipelines.data.records import Document


class DocumentCounts:
    """Counts documents and bytes as they pass."""

    def __init__(self) -> None:
        self._read: Counter[str] = Counter()
        self._dropped: dict[str, Counter[str]] = defaultdict(Counter)
        self._kept: dict[str, Counter[str]] = defaultdict(Counter)
        self._bytes: dict[str, Counter[str]] = defaultdict(Counter)
        self._licenses: dict[str, set[str]] = defaultdict(set)

    def read(self, source: str) -> None:
        """Count a document that was read."""
        self._read[source] += 1

    def drop(self, source: str, reason: str) -> None:
        """Count a document that was dropped."""
        self._dropped[source][reason] += 1

    def keep(self, document: Document, split: str) -> None:
        """Count a document that was kept in a split."""
        self._kept[split][document.source] += 1
        self._bytes[split][document.source] += len(document.text.encode())
        self._licenses[document.source].add(document.license)

    def documents(self, split: str) -> int:
        """Return the documents kept in a split."""
        return self._kept[split].total()

    def bytes(self, split: str) -> int:
        """Return the UTF-8 bytes kept in a split."""
        return self._bytes[split].total()

    def reasons(self) -> dict[str, int]:
        """Return reason -> documents dropped, over all sources."""
        return dict(sorted(sum(self._dropped.values(), Counter()).items()))

    def to_json(self) -> dict[str, Any]:
        """Return all counts, sorted by name."""
        return {
            "sources": {source: self._source(source) for source in sorted(self._read)},
            "splits": {split: self._split(split) for split in sorted(self._kept)},
        }

    def _source(self, source: str) -> dict[str, Any]:
        dropped = self._dropped[source]
        return {
            "read": self._read[source],
            "kept": self._read[source] - dropped.total(),
            "dropped": dict(sorted(dropped.items())),
            "licenses": sorted(self._licenses[source]),
        }

    def _split(self, split: str) -> dict[str, Any]:
        sizes = self._bytes[split]
        return {
            source: {"documents": number, "bytes": sizes[source]}
            for source, number in sorted(self._kept[split].items())
        }


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the report as a table, a row per source: read, kept, a column per reason, bytes per split.

    Args:
        report: the parsed `report.json` of a prepare artifact.
    """
    reasons = sorted({reason for source in report["sources"].values() for reason in source["dropped"]})
    return [
        {
            "source": name,
            "read": source["read"],
            "kept": source["kept"],
            **{reason: source["dropped"].get(reason, 0) for reason in reasons},
            **{
                f"{split} bytes": report["splits"].get(split, {}).get(name, {}).get("bytes", 0)
                for split in ("train", "validation", "test")
            },
        }
        for name, source in sorted(report["sources"].items())
    ]
