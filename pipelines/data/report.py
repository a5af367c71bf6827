"""Counts of the prepare stage by source: documents read, kept and dropped for each reason, bytes, samples."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from pipelines.data.records import Document

_SAMPLES = 5
"""Samples of what each reason took."""
_EXCERPT = 240
"""Characters of a sample."""


class DocumentCounts:
    """Counts documents and UTF-8 bytes of cleaned text as they pass."""

    def __init__(self) -> None:
        self._read: Counter[str] = Counter()
        self._read_bytes: Counter[str] = Counter()
        self._dropped: dict[str, Counter[str]] = defaultdict(Counter)
        self._dropped_bytes: dict[str, Counter[str]] = defaultdict(Counter)
        self._cut: dict[str, Counter[str]] = defaultdict(Counter)
        self._cut_bytes: dict[str, Counter[str]] = defaultdict(Counter)
        self._masked: dict[str, Counter[str]] = defaultdict(Counter)
        self._kept: dict[str, Counter[str]] = defaultdict(Counter)
        self._bytes: dict[str, Counter[str]] = defaultdict(Counter)
        self._licenses: dict[str, set[str]] = defaultdict(set)
        self._samples: dict[str, list[dict[str, str]]] = defaultdict(list)
        self._offered: Counter[str] = Counter()
        self._random = random.Random(0)

    def read(self, document: Document) -> None:
        """Count a document that was read."""
        self._read[document.source] += 1
        self._read_bytes[document.source] += len(document.text.encode())

    def drop(self, document: Document, reason: str, sample: str = "") -> None:
        """Count a document that was dropped.

        Args:
            document: what is lost with it counts, so it comes as it was before.
            reason: in a few words.
            sample: what shows why; the beginning of the document where it is left out.
        """
        self._dropped[document.source][reason] += 1
        self._dropped_bytes[document.source][reason] += len(document.text.encode())
        self._sample(document, reason, sample or document.text)

    def cut(self, document: Document, reason: str, size: int, sample: str) -> None:
        """Count a document of which `size` bytes were cut."""
        self._cut[document.source][reason] += 1
        self._cut_bytes[document.source][reason] += size
        self._sample(document, reason, sample)

    def mask(self, source: str, masked: Mapping[str, int]) -> None:
        """Count the personal data that was masked in a document."""
        if masked:
            self._masked[source].update(masked)

    def _sample(self, document: Document, reason: str, text: str) -> None:
        """Keep a reservoir of samples for each reason, the same for the same documents in the same order."""
        self._offered[reason] += 1
        entry = {"id": document.id, "source": document.source, "text": text.strip()[:_EXCERPT]}
        if len(self._samples[reason]) < _SAMPLES:
            self._samples[reason].append(entry)
        elif (place := self._random.randrange(self._offered[reason])) < _SAMPLES:
            self._samples[reason][place] = entry

    def keep(self, document: Document, split: str) -> None:
        """Count a document that was kept in a split."""
        self._kept[split][document.source] += 1
        self._bytes[split][document.source] += len(document.text.encode())
        self._licenses[document.source].add(document.license)

    def documents(self, split: str) -> int:
        """Return the documents kept in a split."""
        return self._kept[split].total()

    def sources(self, split: str) -> list[str]:
        """Return the sources of the documents kept in a split, by name."""
        return sorted(self._kept[split])

    def bytes(self, split: str) -> int:
        """Return the UTF-8 bytes kept in a split."""
        return self._bytes[split].total()

    def reasons(self) -> dict[str, int]:
        """Return reason -> documents dropped, over all sources."""
        return _sorted(sum(self._dropped.values(), Counter()))

    def lost_bytes(self) -> dict[str, int]:
        """Return reason -> bytes dropped and cut, over all sources."""
        return _sorted(sum((*self._dropped_bytes.values(), *self._cut_bytes.values()), Counter()))

    def to_json(self) -> dict[str, Any]:
        """Return all counts, sorted by name."""
        return {
            "sources": {source: self._source(source) for source in sorted(self._read)},
            "splits": {split: self._split(split) for split in sorted(self._kept)},
            "samples": {reason: self._samples[reason] for reason in sorted(self._samples)},
        }

    def _source(self, source: str) -> dict[str, Any]:
        dropped = self._dropped[source]
        return {
            "read": self._read[source],
            "read_bytes": self._read_bytes[source],
            "kept": self._read[source] - dropped.total(),
            "dropped": _sorted(dropped),
            "dropped_bytes": _sorted(self._dropped_bytes[source]),
            "cut": _sorted(self._cut[source]),
            "cut_bytes": _sorted(self._cut_bytes[source]),
            "masked": _sorted(self._masked[source]),
            "licenses": sorted(self._licenses[source]),
        }

    def _split(self, split: str) -> dict[str, Any]:
        sizes = self._bytes[split]
        return {
            source: {"documents": number, "bytes": sizes[source]}
            for source, number in sorted(self._kept[split].items())
        }


def _sorted(counter: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counter.items()))


def losses(report: Mapping[str, Any], bytes_per_token: float | None = None) -> list[dict[str, Any]]:
    """Return what was lost as a table, a row per source and reason, most bytes first.

    Args:
        report: the parsed `report.json` of a prepare artifact.
        bytes_per_token: of the training split, from which the tokens that were lost are reckoned.
    """
    table: list[dict[str, Any]] = []
    for name, source in report["sources"].items():
        dropped, cut = source.get("dropped_bytes", {}), source.get("cut_bytes", {})
        for reason in sorted({*dropped, *cut}):
            size = dropped.get(reason, 0) + cut.get(reason, 0)
            row = {
                "source": name,
                "reason": reason,
                "dropped": source["dropped"].get(reason, 0),
                "cut": source.get("cut", {}).get(reason, 0),
                "bytes": size,
                "share": size / max(source["read_bytes"], 1),
            }
            if bytes_per_token:
                row["tokens_about"] = round(size / bytes_per_token)
            table.append(row)
    return sorted(table, key=lambda row: (-row["bytes"], row["source"], row["reason"]))
