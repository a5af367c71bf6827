"""The first pass over the corpus: read, clean, filter, drop exact copies, and sign what is left.

Texts go through memory a batch at a time and on to a file on disk; what stays in memory is a few hundred bytes per
document. Batches are cleaned by worker processes and come back in the order they were read, so that the number of
workers changes nothing but the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
from array import array
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.core.errors import IntegrityError
from pipelines.data import dedup, filters, passages, personal_data
from pipelines.data.clean import clean, words
from pipelines.data.config import PrepareConfig
from pipelines.data.document_files import DocumentWriter
from pipelines.data.records import DAMAGED_SHARD, Document, Quarantined
from pipelines.data.report import DocumentCounts
from pipelines.data.rules import registry
from pipelines.data.rules.base import Page, Rule
from pipelines.data.shingles import as_units

CLEANED = "cleaned.jsonl.zst"
QUARANTINE = "quarantine.jsonl"
_SIGNATURES = "signatures.u32"
_SHINGLES = "shingles.u32"
_FINGERPRINTS = "fingerprints.u64"
_BATCH_CHARACTERS = 1 << 19
_BATCHES_PER_WORKER = 2
"""Batches under way per worker: the bound on texts in memory."""
_EXAMPLES = 5
_REPORT_EVERY = 500
"""Documents between two progress reports."""


@dataclass(frozen=True)
class Cleaned:
    """A document after cleaning, with what decides its fate."""

    document: Document
    dropped: str | None
    """Reason of the filter that it did not pass."""
    digest: bytes
    """16 bytes that are equal for texts with the same normal form."""
    masked: Counter[str] = field(default_factory=Counter)
    """How much personal data of each kind was masked."""
    signature: dedup.Signatures = field(default_factory=lambda: np.empty(0, dtype=np.uint32))
    """MinHash signature, [permutations]; empty when dropped, as the next two."""
    shingles: dedup.Shingles = field(default_factory=lambda: np.empty(0, dtype=np.uint32))
    fingerprints: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    """Numbers that texts with a common passage share; see `passages`."""


@dataclass
class Survey:
    """What the first pass leaves: the documents that are no exact copies, in order, and facts about them."""

    documents: Path
    """File of the cleaned documents; see `document_files`."""
    signatures: dedup.Signatures
    """[documents in the file, permutations], mapped from disk."""
    shingles: dedup.ShingleFile
    fingerprints: FingerprintFile
    lengths: list[int]
    """Characters of each document in the file."""
    works: list[str]
    """Work of each document in the file."""
    links: list[tuple[str, str]]
    """Pairs of works that held copies of one document."""
    quarantined: int
    duplicate_ids: int
    """Documents whose id an earlier one has; they stay."""


class FingerprintFile:
    """The fingerprints of many documents in one file, mapped from disk.

    Args:
        path: uint64 numbers, one document after the other.
        sizes: numbers of each document.
    """

    def __init__(self, path: Path, sizes: list[int]) -> None:
        self._path = path
        self._offsets = np.concatenate(([0], np.cumsum(np.asarray(sizes, dtype=np.int64)))).astype(np.int64)

    def documents(self) -> Iterator[NDArray[np.uint64]]:
        """Yield the numbers of each document, in order."""
        if not self._offsets[-1]:
            yield from (np.zeros(0, dtype=np.uint64) for _ in self._offsets[1:])
            return
        values = np.memmap(self._path, dtype=np.uint64, mode="r")
        for first, last in zip(self._offsets[:-1].tolist(), self._offsets[1:].tolist(), strict=True):
            yield np.asarray(values[first:last])


@dataclass
class _Quarantine:
    path: Path
    count: int = 0
    damaged: bool = False
    examples: list[str] = field(default_factory=list)
    mends: dict[str, None] = field(default_factory=dict)
    """What mends the records, in order, each once."""

    def add(self, record: Quarantined) -> None:
        self.count += 1
        self.damaged |= record.reason.startswith(DAMAGED_SHARD)
        if record.do and len(self.mends) < _EXAMPLES:
            self.mends[record.do] = None
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{record.shard}, line {record.line}, byte {record.offset}: {record.reason}")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: value for name, value in asdict(record).items() if value != ""}) + "\n")

    def refuse_above(self, max_bad_fraction: float, documents: int) -> None:
        """Stop when too many records are bad, or when a damaged shard hides how many are."""
        fraction = self.count / max(self.count + documents, 1)
        if fraction > max_bad_fraction or (self.damaged and max_bad_fraction < 1):
            raise IntegrityError(
                f"{self.count} of {self.count + documents} records are malformed ({fraction:.2%}); "
                f"prepare.max_bad_fraction allows {max_bad_fraction:.2%}. The first:\n"
                + "\n".join(f"    {example}" for example in self.examples),
                hint="; ".join([*self.mends, "repair the records, or raise prepare.max_bad_fraction"])
                + f"; all of them are listed in {self.path}",
            )


def survey(
    records: Iterable[Document | Quarantined],
    scratch: Path,
    config: PrepareConfig,
    counts: DocumentCounts,
    progress: Callable[[int], None] = lambda _done: None,
) -> Survey:
    """Clean the corpus into a file in `scratch`.

    Args:
        records: the corpus, in order.
        scratch: folder for the documents, signatures and quarantine file; what an earlier attempt left is replaced.
        config: thresholds.
        counts: counts every document read and every one dropped.
        progress: told the number of documents cleaned so far, now and then.

    Raises:
        IntegrityError: more malformed records than `config.max_bad_fraction`.
    """
    (scratch / QUARANTINE).write_bytes(b"")
    quarantine = _Quarantine(scratch / QUARANTINE)
    first: dict[bytes, tuple[str, str]] = {}
    works: list[str] = []
    links: list[tuple[str, str]] = []
    ids = array("Q")
    lengths: list[int] = []
    sizes: dict[str, list[int]] = {_SHINGLES: [], _FINGERPRINTS: []}
    done = 0
    with (
        DocumentWriter(scratch / CLEANED) as kept,
        (scratch / _SIGNATURES).open("wb") as signatures,
        (scratch / _SHINGLES).open("wb") as shingles,
        (scratch / _FINGERPRINTS).open("wb") as fingerprints,
        contextlib.closing(_clean_all(_batches(records, quarantine), config, scratch)) as batches,
    ):
        for cleaned in (one for batch in batches for one in batch):
            done += 1
            if done % _REPORT_EVERY == 0:
                progress(done)
            document = cleaned.document
            counts.read(document)
            counts.mask(document.source, cleaned.masked)
            ids.append(int.from_bytes(hashlib.blake2b(document.id.encode(), digest_size=8).digest()))
            if cleaned.dropped is not None:
                counts.drop(document, cleaned.dropped)
            elif cleaned.digest in first:
                original, work = first[cleaned.digest]
                counts.drop(document, "exact duplicate", f"a copy of {original}")
                links.append((work, document.work))
            else:
                first[cleaned.digest] = document.id, document.work
                works.append(document.work)
                lengths.append(len(document.text))
                kept.write(document)
                signatures.write(cleaned.signature.tobytes())
                shingles.write(cleaned.shingles.tobytes())
                fingerprints.write(cleaned.fingerprints.tobytes())
                sizes[_SHINGLES].append(len(cleaned.shingles))
                sizes[_FINGERPRINTS].append(len(cleaned.fingerprints))
    quarantine.refuse_above(config.max_bad_fraction, done)
    duplicate_ids = len(ids) - len(np.unique(np.frombuffer(ids, dtype=np.uint64))) if ids else 0
    return Survey(
        scratch / CLEANED,
        _map(scratch / _SIGNATURES, config),
        dedup.ShingleFile(scratch / _SHINGLES, sizes[_SHINGLES]),
        FingerprintFile(scratch / _FINGERPRINTS, sizes[_FINGERPRINTS]),
        lengths,
        works,
        links,
        quarantine.count,
        duplicate_ids,
    )


def fit_rules(config: PrepareConfig, texts: Callable[[], Iterable[str]], scratch: Path) -> None:
    """Let the rules learn that do, from the texts of the corpus.

    Args:
        config: the rules.
        texts: begins a pass over the corpus.
        scratch: where what they learned is kept for `survey`.
    """
    for rule in registry.make(config.rules, scratch):
        if rule.learns:
            rule.fit(clean(text) for text in texts())


def clean_one(document: Document, config: PrepareConfig, rules: Sequence[Rule] | None = None) -> Cleaned:
    """Clean, filter and sign one document; without a `work` of its own it becomes one.

    Args:
        document: as it was read.
        config: thresholds.
        rules: of the recipe; None for those of them that learn nothing.
    """
    text, masked = personal_data.mask(clean(document.text), config.mask)
    terms = words(text)
    digest = hashlib.sha256(" ".join(terms).encode()).digest()[:16]
    document = dataclasses.replace(document, text=text, work=document.work or f"document/{digest.hex()}")
    units = as_units(terms, whole=text.isascii())
    reason = filters.reason_to_drop(text, units, config)
    if reason is None:
        page = Page(text, units)
        if rules is None:
            rules = [rule for rule in registry.make(config.rules) if not rule.learns]
        asked = (rule for rule in rules if rule.concerns(document.source))
        reason = next((found for rule in asked if (found := rule.reason(page))), None)
    if reason is not None:
        return Cleaned(document, reason, digest, masked)
    distinct = dedup.shingles(units.hashes, config.shingle_words)
    signature = dedup.signature(distinct, permutations=config.permutations, seed=config.seed)
    repeated = config.repeated_passages
    marks = np.empty(0, dtype=np.uint64)
    if repeated.words:
        marks = passages.fingerprints(units, repeated.words, document.source if repeated.scope == "source" else "")
    return Cleaned(document, None, digest, masked, signature, distinct, marks)


def _clean_batch(batch: list[Document], config: PrepareConfig, scratch: Path) -> list[Cleaned]:
    rules = registry.make(config.rules, scratch)
    return [clean_one(document, config, rules) for document in batch]


def _batches(records: Iterable[Document | Quarantined], quarantine: _Quarantine) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for record in records:
        if isinstance(record, Quarantined):
            quarantine.add(record)
            continue
        batch.append(record)
        size += len(record.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _clean_all(
    batches: Iterator[list[Document]], config: PrepareConfig, scratch: Path
) -> Generator[list[Cleaned], None, None]:
    """Yield the batches cleaned, in order; worker processes are started only for more than one batch."""
    clean_batch = functools.partial(_clean_batch, config=config, scratch=scratch)
    first, second = next(batches, []), next(batches, [])
    if config.workers == 1 or not second:
        yield from map(clean_batch, (first, second))
        yield from map(clean_batch, batches)
        return
    # Fresh interpreters: a fork would copy the threads' locks of whoever runs this stage.
    with ProcessPoolExecutor(config.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        under_way: deque[Future[list[Cleaned]]] = deque(pool.submit(clean_batch, batch) for batch in (first, second))
        for batch in batches:
            under_way.append(pool.submit(clean_batch, batch))
            if len(under_way) > config.workers * _BATCHES_PER_WORKER:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def _map(path: Path, config: PrepareConfig) -> dedup.Signatures:
    if not path.stat().st_size:
        return np.empty((0, config.permutations), dtype=np.uint32)
    return np.memmap(path, dtype=np.uint32, mode="r").reshape(-1, config.permutations)
