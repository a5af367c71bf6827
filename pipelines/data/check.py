"""What a run would do with a corpus, from up to a thousand records of it, spread over its files."""

from __future__ import annotations

import json
import statistics
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.core.errors import IntegrityError
from pipelines.data import reader, survey
from pipelines.data.config import PrepareConfig
from pipelines.data.records import DAMAGED_SHARD, Document, Quarantined
from pipelines.data.rules import language

RECORDS = 1000
_LETTERS = 100
"""Letters of a document that are looked up for its script."""
_EXAMPLES = 5
_IDENTIFIED = 200
"""Documents whose language is told, about."""
_CERTAIN = 0.5
"""Probability below which a language is not told."""


@dataclass
class _Sample:
    documents: list[Document] = field(default_factory=list)
    bad: list[Quarantined] = field(default_factory=list)
    total: float = 0.0
    """Records in the corpus, as far as they can be told."""
    whole: bool = True
    """Whether every record was read."""
    text_bytes: float = 0.0


def check(folder: Path, names: Sequence[str], config: PrepareConfig, *, gate_documents: int) -> dict[str, Any]:
    """Look at a corpus and say what would become of it.

    Args:
        folder: the corpus, a folder or one file.
        names: its files, relative to it.
        config: how it would be prepared.
        gate_documents: held-out documents that the gate asks for.

    Returns:
        What was found; `refused` lists what would end the run, each with `what` and `do`, and `said` what may.
    """
    found = reader.inspect(folder, names, config)
    sample = _sample(folder, found, config)
    texts = [document for document in sample.documents if document.text]
    total = round(sample.total)
    kept = Counter(survey.clean_one(document, config).dropped or "kept" for document in texts)
    kept["empty"] += len(sample.documents) - len(texts)
    share = kept["kept"] / max(len(sample.documents), 1)
    held_out = {name: share * total * getattr(config, f"{name}_fraction") for name in ("validation", "test")}
    sizes = sorted(len(document.text) for document in sample.documents)
    ids = Counter(document.id for document in sample.documents)
    return {
        "formats": dict(sorted(Counter(found.kinds.values()).items())),
        "files": len(found.kinds),
        "left_out": found.left_out,
        "bytes": sum((folder if folder.is_file() else folder / name).stat().st_size for name in found.kinds),
        "records_read": len(sample.documents) + len(sample.bad),
        "documents": total,
        "documents_exact": sample.whole,
        "text_bytes": round(sample.text_bytes),
        "characters": _sizes(sizes),
        "scripts": _scripts(sample.documents),
        "languages": _languages(sample.documents),
        "sources": dict(Counter(document.source for document in sample.documents).most_common(_EXAMPLES)),
        "licenses": dict(Counter(document.license for document in sample.documents).most_common(_EXAMPLES)),
        "fields": _fields(sample.documents),
        "duplicate_ids": [name for name, count in ids.most_common(_EXAMPLES) if count > 1],
        "malformed": len(sample.bad),
        "kept": kept["kept"],
        "dropped": {reason: count for reason, count in sorted(kept.items()) if reason != "kept" and count},
        "held_out": {name: round(count) for name, count in held_out.items()},
        "refused": _refused(folder, found, sample, config, kept),
        "said": _said(sample, held_out, gate_documents),
    }


def _sample(folder: Path, found: reader.Inspection, config: PrepareConfig) -> _Sample:
    """Read up to `RECORDS` records, as many of each file as of any other."""
    sample = _Sample()
    names = list(found.kinds)
    step = max(1, len(names) // RECORDS)
    looked_at = names[::step]
    quota = max(1, RECORDS // max(len(looked_at), 1))
    for name in looked_at:
        part = reader.sample(folder, name, config, quota, few_texts=found.few_texts)
        sample.documents += part.documents
        sample.bad += part.bad
        sample.total += part.total * step
        sample.whole &= part.whole and step == 1
        size = sum(len(document.text.encode()) for document in part.documents)
        sample.text_bytes += size * step * part.total / max(len(part.documents) + len(part.bad), 1)
    return sample


def _sizes(sizes: Sequence[int]) -> dict[str, int]:
    if not sizes:
        return {}
    return {"smallest": sizes[0], "median": round(statistics.median(sizes)), "largest": sizes[-1]}


def _scripts(documents: Sequence[Document]) -> dict[str, float]:
    """Return script -> share of the letters at the beginning of each document, the most common ones."""
    counts: Counter[str] = Counter()
    for document in documents:
        letters = [character for character in document.text[: 4 * _LETTERS] if character.isalpha()][:_LETTERS]
        counts.update(unicodedata.name(letter, "UNKNOWN").partition(" ")[0] for letter in letters)
    return {script: round(count / counts.total(), 3) for script, count in counts.most_common(_EXAMPLES)}


def _languages(documents: Sequence[Document]) -> dict[str, float]:
    """Return language -> share of the documents, the most common ones; `?` where it cannot be told."""
    some = documents[:: max(1, len(documents) // _IDENTIFIED)]
    told = [language.identify(document.text) for document in some if document.text]
    counts = Counter(code if probability >= _CERTAIN else "?" for code, probability in told)
    return {code: round(count / counts.total(), 3) for code, count in counts.most_common(_EXAMPLES)}


def _fields(documents: Sequence[Document]) -> list[str]:
    """Return the fields that are kept as metadata."""
    names: dict[str, None] = {}
    for document in documents[:_EXAMPLES]:
        names.update(dict.fromkeys(json.loads(document.metadata) if document.metadata else {}))
    return list(names)


def _refused(
    folder: Path, found: reader.Inspection, sample: _Sample, config: PrepareConfig, kept: Counter[str]
) -> list[dict[str, str]]:
    """Return what would end the run in prepare."""
    refused: list[dict[str, str]] = []
    try:
        reader.refuse_unread(found, folder)
    except IntegrityError as error:
        refused.append({"what": error.message, "do": error.hint or ""})
    fraction = len(sample.bad) / max(len(sample.bad) + len(sample.documents), 1)
    damaged = any(one.reason.startswith(DAMAGED_SHARD) for one in sample.bad)
    if fraction > config.max_bad_fraction or (damaged and config.max_bad_fraction < 1):
        mends = list(dict.fromkeys(one.do for one in sample.bad if one.do))
        reasons = Counter(f"{one.reason} ({one.shard}, record {one.line})" for one in sample.bad[:_EXAMPLES])
        refused.append(
            {
                "what": f"{fraction:.2%} of the records are malformed, prepare.max_bad_fraction allows "
                f"{config.max_bad_fraction:.2%}: {'; '.join(reasons)}",
                "do": "; ".join([*mends, "repair the records, or raise prepare.max_bad_fraction"]),
            }
        )
    few = 2 * config.min_held_out_documents
    if sample.documents and sample.whole and kept["kept"] <= few:
        dropped = ", ".join(f"{count} {reason}" for reason, count in kept.items() if reason != "kept" and count)
        refused.append(
            {
                "what": f"{kept['kept']} documents are left, dropped: {dropped or 'none'}; validation and test alone "
                f"hold {few} (prepare.min_held_out_documents)",
                "do": "add documents, or let more pass: prepare.min_characters, prepare.max_repeated_lines, ...",
            }
        )
    return refused


def _said(sample: _Sample, held_out: Mapping[str, float], gate_documents: int) -> list[str]:
    """Return what may go wrong later."""
    said = []
    if sample.documents and held_out["test"] < gate_documents:
        said.append(
            f"about {held_out['test']:.0f} documents will judge the models, the gate wants {gate_documents} "
            "(promote.min_documents): raise prepare.test_fraction or add documents"
        )
    return said
