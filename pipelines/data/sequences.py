"""The last step of preparing: the documents of every split as packed sequences of token ids, and `index.json`."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.data import document_files, packing, shards
from pipelines.data.config import PrepareConfig
from pipelines.data.encoder import Encoder
from pipelines.data.packing import Block
from pipelines.data.report import DocumentCounts
from pipelines.data.split import SPLITS
from pipelines.data.tokenizer import CorpusTokenizer

_ENCODE_BATCH = 64
"""Documents tokenized at a time: the bound on texts in memory while packing."""
_SOURCES = 256
"""Most sources that a split is packed by."""
_COMPARED = 256
"""Documents that the encoder is tried on before it is used."""


def write(trained: CorpusTokenizer, out_dir: Path, config: PrepareConfig, counts: DocumentCounts) -> dict[str, Any]:
    """Tokenize and pack `documents/SPLIT.jsonl.zst` of every split, write `index.json` and return it.

    Raises:
        IntegrityError: a split fills no sequence.
    """
    ids = {f"{role}_id": number for role, number in trained.ids.items()}
    dtype = shards.dtype_for(trained.vocab_size)
    encoder = Encoder(trained.tokenizer, list(islice(_texts(out_dir, "train"), _COMPARED)), config.workers)
    index = {
        "format": shards.FORMAT,
        "sequence_length": config.sequence_length,
        "vocab_size": trained.vocab_size,
        "dtype": dtype,
        "packing": config.packing,
        **ids,
        "splits": {split: _split(encoder, out_dir, split, config, counts, ids, dtype) for split in SPLITS},
    }
    (out_dir / shards.INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return index


def _split(
    encoder: Encoder,
    out_dir: Path,
    split: str,
    config: PrepareConfig,
    counts: DocumentCounts,
    ids: dict[str, int],
    dtype: str,
) -> dict[str, Any]:
    length = config.sequence_length
    by_source = split == "train" and config.pack_by == "source"
    packed = _Packed(config, ids)
    if by_source:
        blocks = _by_source(packed, encoder, out_dir, split, counts.sources(split))
    else:
        blocks = packed("", _tokens(encoder, _texts(out_dir, split)))
    written = shards.write(blocks, out_dir, split, sequence_length=length, dtype=dtype, shard_bytes=config.shard_bytes)
    sequences, tokens = sum(packed.sequences.values()), sum(packed.tokens.values())
    if tokens < length or not sequences:
        raise IntegrityError(
            f"the {split} split has {tokens} tokens, less than one sequence of {length}",
            hint="lower prepare.sequence_length, or raise the split's fraction",
        )
    room = sequences * length
    found = {
        "shards": written,
        "sequences": sequences,
        "tokens": min(tokens, room),
        "padding": max(room - tokens, 0),
        "dropped_tokens": max(tokens - room, 0),
        "documents": counts.documents(split),
        "bytes": counts.bytes(split),
    }
    names = [
        {"source": name, "sequences": packed.sequences[name], "tokens": packed.tokens[name]} for name in packed.tokens
    ]
    return found | {"sources": names} if by_source else found


class _Packed:
    """Packs the documents of one source after another, and counts tokens and sequences of each."""

    def __init__(self, config: PrepareConfig, ids: dict[str, int]) -> None:
        self._length, self._best_fit = config.sequence_length, config.packing == "best_fit"
        self._special = {name: ids[name] for name in ("bos_id", "eos_id", "pad_id")[: 3 if self._best_fit else 2]}
        self.sequences = Counter[str]()
        self.tokens = Counter[str]()
        """With the two that packing adds to each document."""

    def __call__(self, source: str, documents: Iterator[list[int]]) -> Iterator[Block]:
        """Yield the sequences of a source."""
        pack = packing.best_fit if self._best_fit else packing.concatenated
        for block in pack(self._counted(source, documents), self._length, **self._special):
            self.sequences[source] += len(block.tokens_ST)
            yield block

    def _counted(self, source: str, documents: Iterator[list[int]]) -> Iterator[list[int]]:
        for tokens in documents:
            self.tokens[source] += len(tokens) + 2
            yield tokens


def _by_source(packed: _Packed, encoder: Encoder, out_dir: Path, split: str, sources: Sequence[str]) -> Iterator[Block]:
    """Yield the sequences of each source; the documents are read once for each of them.

    Raises:
        ConfigError: there are too many sources.
    """
    if len(sources) > _SOURCES:
        raise ConfigError(
            f'prepare.pack_by = "source": the corpus has {len(sources)} sources, more than {_SOURCES}',
            hint="let prepare.fields.source name a field with fewer values",
        )
    for source in sources:
        numbers = array("q")
        for block in packed(source, _tokens(encoder, _texts(out_dir, split, source, numbers))):
            map_P4 = block.map_P4.copy()
            map_P4[:, 2] = np.asarray(numbers)[map_P4[:, 2]]
            yield Block(block.tokens_ST, map_P4)


def _texts(out_dir: Path, split: str, source: str | None = None, numbers: array[int] | None = None) -> Iterator[str]:
    """Yield the texts of a split, or of one source of it, whose documents' numbers in the split go to `numbers`."""
    for number, document in enumerate(document_files.documents(out_dir / "documents" / f"{split}.jsonl.zst")):
        if source in (None, document.source):
            if numbers is not None:
                numbers.append(number)
            yield document.text


def _tokens(encoder: Encoder, texts: Iterator[str]) -> Iterator[list[int]]:
    while batch := list(islice(texts, _ENCODE_BATCH)):
        yield from encoder(batch)
