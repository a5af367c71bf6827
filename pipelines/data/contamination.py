"""Contamination: held-out text that also stands in the training text, where a model could learn it by heart.

Measured on runs of 13 words, the measure of GPT-3 (Brown et al. 2020, appendix C): case and punctuation do not count,
and a run that occurs twice counts twice. Removing near-duplicates compares whole documents; this finds a quoted
passage. Items of the evaluation tasks are cut from the test split and carry no text of their own, so its share covers
them. The held-out runs are held in memory, 8 bytes each, while the training text streams past.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.data.clean import words
from pipelines.data.records import Document
from pipelines.data.shingles import hash_runs, hash_words

WORDS = 13
"""Words per run."""
_SHOWN = 10
_COPIED = 0.5
"""Share of its runs from which a document is called copied."""


@dataclass(frozen=True)
class _HeldOut:
    """One held-out document."""

    split: str
    id: str
    source: str
    runs: NDArray[np.uint64]


def runs_of(text: str) -> NDArray[np.uint64]:
    """Return one number for each run of 13 words of a text; a text of fewer words has none."""
    hashes = hash_words(words(text))
    return hash_runs(hashes, WORDS) if len(hashes) >= WORDS else np.zeros(0, dtype=np.uint64)


def measure(train: Iterable[Document], held_out: Mapping[str, Iterable[Document]]) -> dict[str, Any]:
    """Return what the training text shares with each held-out split.

    Args:
        train: documents of the training split; read once.
        held_out: split name -> its documents.

    Returns:
        `words`, `share` (of all held-out runs), and for each split `runs`, `shared`, `share`, `documents` that share
        a run, `copied` (those that share half of theirs) and `worst`: the documents that share most.
    """
    documents = [_HeldOut(split, d.id, d.source, runs_of(d.text)) for split, found in held_out.items() for d in found]
    wanted = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *(held.runs for held in documents)]))
    seen = np.zeros(len(wanted), dtype=bool)
    for document in train:
        runs = runs_of(document.text)
        places = np.searchsorted(wanted, runs)
        places[places == len(wanted)] = 0
        if len(wanted):
            seen[places[wanted[places] == runs]] = True
    shared = [int(seen[np.searchsorted(wanted, held.runs)].sum()) for held in documents]
    splits = {
        split: _split([(held, n) for held, n in zip(documents, shared, strict=True) if held.split == split])
        for split in held_out
    }
    total = sum(found["runs"] for found in splits.values())
    return {"words": WORDS, "share": sum(shared) / max(total, 1), "splits": splits}


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
