"""The first pass over the corpus: read, clean, filter, drop exact copies, and sign what is left.

Texts go through memory a batch at a time and on to a file on disk; what stays in memory is a few hundred bytes per
document. Batches are cleaned by worker processes and come back in the order they were read, so that the number of
workers changes nothing but the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.core.errors import IntegrityError
from pipelines.data import dedup, filters
from pipelines.data.clean import clean, words
from pipelines.data.config import PrepareConfig
from pipelines.data.document_files import DocumentWriter
from pipelines.data.records import DAMAGED_SHARD, Document, Quarantined
from pipelines.data.report import DocumentCounts
from pipelines.data.shingles import hash_words

CLEANED = "cleaned.jsonl.zst"
QUARANTINE = "quarantine.jsonl"
_SIGNATURES = "signatures.u32"
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
    signature: dedup.Signatures
    """MinHash signature, [permutations]; empty when dropped."""


@dataclass
class Survey:
    """What the first pass leaves: the documents that are no exact copies, in order, and facts about them."""

    documents: Path
    """File of the cleaned documents; see `document_files`."""
    signatures: dedup.Signatures
    """[documents in the file, permutations], mapped from disk."""
    works: list[str]
    """Work of each document in the file."""
    links: list[tuple[str, str]]
    """Pairs of works that held copies of one document."""
    quarantined: int
    duplicate_ids: int
    """Documents whose id an earlier one has; they stay."""


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
    first_work: dict[bytes, str] = {}
    works: list[str] = []
    links: list[tuple[str, str]] = []
    ids = array("Q")
    done = 0
    with (
        DocumentWriter(scratch / CLEANED) as kept,
        (scratch / _SIGNATURES).open("wb") as signatures,
        contextlib.closing(_clean_all(_batches(records, quarantine), config)) as batches,
    ):
        for cleaned in (one for batch in batches for one in batch):
            done += 1
            if done % _REPORT_EVERY == 0:
                progress(done)
            document = cleaned.document
            counts.read(document.source)
            ids.append(int.from_bytes(hashlib.blake2b(document.id.encode(), digest_size=8).digest()))
            if cleaned.dropped is not None:
                counts.drop(document.source, cleaned.dropped)
            elif cleaned.digest in first_work:
                counts.drop(document.source, "exact duplicate")
                links.append((first_work[cleaned.digest], document.work))
            else:
                first_work[cleaned.digest] = document.work
                works.append(document.work)
                kept.write(document)
                signatures.write(cleaned.signature.tobytes())
    quarantine.refuse_above(config.max_bad_fraction, done)
    duplicate_ids = len(ids) - len(np.unique(np.frombuffer(ids, dtype=np.uint64))) if ids else 0
    return Survey(scratch / CLEANED, _map(scratch / _SIGNATURES, config), works, links, quarantine.count, duplicate_ids)


def clean_one(document: Document, config: PrepareConfig) -> Cleaned:
    """Clean, filter and sign one document; without a `work` of its own it becomes one."""
    text = clean(document.text)
    terms = words(text)
    digest = hashlib.sha256(" ".join(terms).encode()).digest()[:16]
    document = dataclasses.replace(document, text=text, work=document.work or f"document/{digest.hex()}")
    hashes = hash_words(terms)
    if reason := filters.reason_to_drop(text, hashes, config):
        return Cleaned(document, reason, digest, np.empty(0, dtype=np.uint32))
    signature = dedup.signature(
        hashes, shingle_words=config.shingle_words, permutations=config.permutations, seed=config.seed
    )
    return Cleaned(document, None, digest, signature)


def _clean_batch(batch: list[Document], config: PrepareConfig) -> list[Cleaned]:
    return [clean_one(document, config) for document in batch]


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


def _clean_all(batches: Iterator[list[Document]], config: PrepareConfig) -> Generator[list[Cleaned], None, None]:
    """Yield the batches cleaned, in order; worker processes are started only for more than one batch."""
    clean_batch = partial(_clean_batch, config=config)
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
