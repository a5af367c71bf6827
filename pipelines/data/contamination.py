"""Contamination: training text that holds held-out text or items of an evaluation, which a model could learn by heart.

Held-out text is looked for in runs of 13 words, the measure of GPT-3 (Brown et al. 2020, appendix C): case and
punctuation do not count, and a run that occurs twice counts twice. Removing near-duplicates compares whole documents;
this finds a quoted passage. Items of evaluation sets are looked for in the same runs, and whole with up to a fifth of
their words changed (`approximate`). The held-out runs are in memory, 8 bytes each,
while the training text streams past.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.core.errors import DataRefused
from pipelines.data import passages
from pipelines.data.approximate import ItemIndex
from pipelines.data.config import PrepareConfig
from pipelines.data.evaluation_items import Items
from pipelines.data.records import Document
from pipelines.data.report import DocumentCounts
from pipelines.data.shingles import Hashes, units_of, word_runs

WORDS = 13
"""Words per run."""
MAX_SHARE = 0.05
"""Share of the held-out runs that `refuse` bears unless it is told another."""
CONTAMINATED = "contaminated"
"""Reason by which the report counts."""
_SHOWN = 10
_COPIED = 0.5
"""Share of its runs from which a document is called copied."""
_ROUNDS = 8
"""Times that a document is cut before it is dropped: a cut may bring together what makes a run anew."""


@dataclass(frozen=True)
class _HeldOut:
    """One held-out document."""

    split: str
    id: str
    source: str
    runs: Hashes


def runs_of(text: str) -> Hashes:
    """Return one number for each run of 13 words of a text; a text of fewer words has none."""
    return word_runs(units_of(text), WORDS)[0]


@dataclass
class Cleansed:
    """What was done to the training text."""

    action: str
    documents: int = 0
    """Documents dropped."""
    cut: int = 0
    """Documents of which something was cut."""
    bytes: int = 0
    """UTF-8 bytes of what was dropped and cut."""
    samples: list[dict[str, str]] = field(default_factory=list)


class Contamination:
    """Compares training documents with held-out ones and with items of evaluation sets.

    Args:
        held_out: split name -> its documents.
        items: of evaluation sets.
    """

    def __init__(self, held_out: Mapping[str, Iterable[Document]], items: Items | None = None) -> None:
        self._splits = list(held_out)
        self._documents = [
            _HeldOut(split, d.id, d.source, runs_of(d.text)) for split, found in held_out.items() for d in found
        ]
        none = np.zeros(0, dtype=np.uint64)
        self._held_out = passages.Known(np.unique(np.concatenate([none, *(held.runs for held in self._documents)])))
        self._seen = np.zeros(len(self._held_out.numbers), dtype=bool)
        self._items = items or Items()
        runs = [word_runs(units, WORDS)[0] for units in self._items.units]
        everything = np.concatenate([none, *runs])
        owners = np.repeat(np.arange(len(runs)), [len(found) for found in runs])
        numbers, first = np.unique(everything, return_index=True)
        self._item_runs, self._owners = passages.Known(numbers), owners[first]
        self._index = ItemIndex(self._items.units)
        self.items_found: set[int] = set()

    def marked(self, text: str) -> NDArray[np.bool_] | None:
        """Return which units of a training text are shared, [units], and remember what was found; None for none."""
        units = units_of(text)
        runs, ends = word_runs(units, WORDS)
        places, shared = self._held_out.places(runs)
        self._seen[places[shared]] = True
        places, of_items = self._item_runs.places(runs)
        self.items_found.update(self._owners[places[of_items]].tolist())
        hits = self._index.find(units.hashes)
        self.items_found.update(hit.item for hit in hits)
        either = shared | of_items
        if not hits and not either.any():
            return None
        starts = np.concatenate((np.flatnonzero(either), np.array([hit.start for hit in hits], dtype=np.int64)))
        stops = np.concatenate((ends[either], np.array([hit.end for hit in hits], dtype=np.int64)))
        return passages.covered(len(units.hashes), starts, stops)

    def report(self) -> dict[str, Any]:
        """Return what the training text shared when it was looked at first.

        Returns:
            `words`, `share` (of all held-out runs), and for each split `runs`, `shared`, `share`, `documents` that
            share a run, `copied` (those that share half of theirs) and `worst`: the documents that share most. `items`
            has, for each evaluation set, `items`, `too_short` and `found` (strings), and some of those.
        """
        shared = [int(self._seen[self._held_out.places(held.runs)[0]].sum()) for held in self._documents]
        pairs = list(zip(self._documents, shared, strict=True))
        splits = {split: _split([pair for pair in pairs if pair[0].split == split]) for split in self._splits}
        total = sum(found["runs"] for found in splits.values())
        return {"words": WORDS, "share": sum(shared) / max(total, 1), "splits": splits, "items": self._of_items()}

    def _of_items(self) -> dict[str, Any]:
        found = Counter(self._items.sets[item] for item in self.items_found)
        shown: dict[str, list[str]] = {}
        for item in sorted(self.items_found):
            shown.setdefault(self._items.sets[item], []).append(self._items.excerpts[item])
        return {
            name: {**counts, "found": found[name], "samples": shown.get(name, [])[:_SHOWN]}
            for name, counts in self._items.counts.items()
        }


def measure(train: Iterable[Document], held_out: Mapping[str, Iterable[Document]]) -> dict[str, Any]:
    """Return what training documents share with each held-out split; see `Contamination.report`."""
    found = Contamination(held_out)
    for document in train:
        found.marked(document.text)
    return found.report()


def cleanse(
    train: Iterable[Document], found: Contamination, config: PrepareConfig, counts: DocumentCounts, done: Cleansed
) -> Iterator[Document]:
    """Yield the training documents without what they share with held-out text and evaluation items.

    Args:
        train: the documents.
        found: compares them.
        config: what is done with what is shared, and how short a document may become.
        counts: told what is dropped and cut.
        done: told it, too.
    """
    for document in train:
        marked = found.marked(document.text)
        if marked is None or config.contamination.action == "refuse":
            yield document
            continue
        left, removed = (
            _cut(document, marked, found) if config.contamination.action == "passage" else ("", [document.text])
        )
        size = len(document.text.encode())
        if len(left.strip()) < config.min_characters:
            done.documents += 1
            counts.drop(document, CONTAMINATED, removed[0])
        else:
            done.cut += 1
            size -= len(left.encode())
            counts.cut(document, CONTAMINATED, size, removed[0])
            yield dataclasses.replace(document, text=left)
        done.bytes += size
        if len(done.samples) < _SHOWN:
            done.samples.append({"id": document.id, "source": document.source, "text": removed[0].strip()[:200]})


def _cut(document: Document, marked: NDArray[np.bool_], found: Contamination) -> tuple[str, list[str]]:
    """Return what is left of a document, nothing of it shared, and what was cut."""
    text, removed = document.text, list[str]()
    current: NDArray[np.bool_] | None = marked
    for _ in range(_ROUNDS):
        if current is None:
            return text, removed
        result = passages.cut(text, current, whole=False)
        text, removed = result.kept, removed + result.removed
        current = found.marked(text)
    return (text, removed) if current is None else ("", [document.text])


def refuse(report: Mapping[str, Any], config: PrepareConfig) -> None:
    """Refuse what the recipe does not bear.

    Raises:
        DataRefused: more held-out runs stand in the training text than allowed, or an item of an evaluation set does.
    """
    bound = MAX_SHARE if config.contamination.max_share is None else config.contamination.max_share
    remedy = "set prepare.contamination.action to `passage` or `document`, which remove it from the training text"
    if report["share"] > bound:
        worst = [
            f"{one['id']} ({one['shared']} of {one['runs']})" for s in report["splits"].values() for one in s["worst"]
        ]
        raise DataRefused(
            f"{report['share']:.2%} of the held-out {WORDS}-word runs also stand in the training text; "
            f"prepare.contamination.max_share is {bound:.2%}; most in {', '.join(worst[:3])}",
            hint=f"{remedy}; or raise prepare.contamination.max_share",
        )
    if found := {name: one for name, one in report["items"].items() if one["found"]}:
        listed = "; ".join(f"{name}: {one['found']} strings, as {one['samples'][0]!r}" for name, one in found.items())
        raise DataRefused(f"the training text holds items of evaluation sets: {listed}", hint=remedy)


def _split(found: list[tuple[_HeldOut, int]]) -> dict[str, Any]:
    runs, shared = sum(len(held.runs) for held, _ in found), sum(number for _, number in found)
    touched = sorted(
        ((held, number) for held, number in found if number),
        key=lambda pair: (-pair[1] / len(pair[0].runs), pair[0].id),
    )
    worst = [
        {"id": held.id, "source": held.source, "runs": len(held.runs), "shared": number}
        for held, number in touched[:_SHOWN]
    ]
    return {
        "runs": runs,
        "shared": shared,
        "share": shared / max(runs, 1),
        "documents": len(touched),
        "copied": sum(number >= _COPIED * len(held.runs) for held, number in touched),
        "worst": worst,
    }
