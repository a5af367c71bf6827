"""The last step of preparing: the documents of every split as packed sequences of token ids, and `index.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines.core.errors import IntegrityError
from pipelines.data import document_files, packing, shards
from pipelines.data.config import PrepareConfig
from pipelines.data.encoder import Encoder
from pipelines.data.report import DocumentCounts
from pipelines.data.split import SPLITS
from pipelines.data.tokenizer import CorpusTokenizer

_ENCODE_BATCH = 64
"""Documents tokenized at a time: the bound on texts in memory while packing."""
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
        "splits": {
            split: _split(_tokens(encoder, _texts(out_dir, split)), out_dir, split, config, counts, ids, dtype)
            for split in SPLITS
        },
    }
    (out_dir / shards.INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return index


def _split(
    documents: Iterator[list[int]],
    out_dir: Path,
    split: str,
    config: PrepareConfig,
    counts: DocumentCounts,
    ids: dict[str, int],
    dtype: str,
) -> dict[str, Any]:
    length = config.sequence_length
    tokens = _Counted(documents)
    if config.packing == "best_fit":
        special = {name: ids[name] for name in ("bos_id", "eos_id", "pad_id")}
        blocks = packing.best_fit(tokens, length, **special)
    else:
        blocks = packing.concatenated(tokens, length, bos_id=ids["bos_id"], eos_id=ids["eos_id"])
    written = shards.write(blocks, out_dir, split, sequence_length=length, dtype=dtype, shard_bytes=config.shard_bytes)
    sequences = sum(entry["sequences"] for entry in written)
    if tokens.total < length:
        raise IntegrityError(
            f"the {split} split has {tokens.total} tokens, less than one sequence of {length}",
            hint="lower prepare.sequence_length, or raise the split's fraction",
        )
    packed = sequences * length
    return {
        "shards": written,
        "sequences": sequences,
        "tokens": min(tokens.total, packed),
        "padding": max(packed - tokens.total, 0),
        "dropped_tokens": max(tokens.total - packed, 0),
        "documents": counts.documents(split),
        "bytes": counts.bytes(split),
    }


class _Counted:
    """Passes documents on and counts their tokens, the two that packing adds included."""

    def __init__(self, documents: Iterator[list[int]]) -> None:
        self._documents = documents
        self.total = 0

    def __iter__(self) -> Iterator[list[int]]:
        for tokens in self._documents:
            self.total += len(tokens) + 2
            yield tokens


def _texts(out_dir: Path, split: str) -> Iterator[str]:
    return (document.text for document in document_files.documents(out_dir / "documents" / f"{split}.jsonl.zst"))


def _tokens(encoder: Encoder, texts: Iterator[str]) -> Iterator[list[int]]:
    while batch := list(islice(texts, _ENCODE_BATCH)):
        yield from encoder(batch)
