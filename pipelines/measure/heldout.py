"""The held-out documents of a prepare artifact, and the tokens that a model was trained on. No torch.

Every model of one prepare artifact is measured on the same documents in the same order: numbers pair up by position.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipelines.core import fingerprint
from pipelines.core.artifact import read_json
from pipelines.core.errors import IntegrityError
from pipelines.data import tokenizer as tokenization

Ids = NDArray[np.int64]
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Document:
    """One held-out document."""

    id: str
    text: str
    source: str

    @property
    def size(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Heldout:
    """What is measured on."""

    documents: tuple[Document, ...]
    total: int
    """Documents of the test split; more than `documents` when the evaluation is truncated."""
    tokens: tuple[Ids, ...]
    """Start token, text and end token of each document."""
    index: dict[str, Any]
    """index.json of the prepare artifact."""

    @property
    def truncated(self) -> bool:
        """True when not every test document is measured."""
        return len(self.documents) < self.total

    @property
    def digest(self) -> str:
        """sha256 over the ids of the documents, in order: which documents were measured."""
        return fingerprint.digest([document.id for document in self.documents])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each document [documents]."""
        return np.array([document.size for document in self.documents], dtype=np.int64)


def load(prepared: Path, max_documents: int | None = None) -> Heldout:
    """Read and tokenize the test documents of a prepare artifact.

    Raises:
        IntegrityError: the split is empty or too small for an interval, or a record is damaged.
    """
    path = prepared / "documents" / "test.jsonl.zst"
    everything = list(read_documents(path))
    if len(everything) < 2:
        raise IntegrityError(
            f"{path} has {len(everything)} documents: a confidence interval over documents needs at least 2",
            hint="give prepare more documents, or a larger share for the test split",
        )
    documents = choose(everything, max_documents)
    index = read_json(prepared / "index.json")
    return Heldout(documents, len(everything), tokenize(documents, prepared / "tokenizer" / TOKENIZER, index), index)


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a zstd-compressed JSON Lines file, in its order."""
    try:
        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8"), start=1):
                yield _document(path, number, line)
    except (FileNotFoundError, zstandard.ZstdError) as error:
        raise IntegrityError(
            f"cannot read {path}: {error}", hint="`ingot verify` tells whether the artifact is damaged"
        ) from error


def choose(documents: list[Document], limit: int | None) -> tuple[Document, ...]:
    """Return at most `limit` documents in their order, picked by the hash of their ids: no source is favoured."""
    if limit is None or limit >= len(documents):
        return tuple(documents)
    return tuple(documents[i] for i in sorted(ranked(documents)[:limit]))


def ranked(documents: Sequence[Document]) -> list[int]:
    """Return the positions of documents by the hash of their ids: an order that favours no source."""
    return sorted(range(len(documents)), key=lambda i: (hashlib.sha256(documents[i].id.encode()).digest(), i))


def tokenize(documents: tuple[Document, ...], tokenizer: Path, index: dict[str, Any]) -> tuple[Ids, ...]:
    """Return the token ids of each document as packing makes them, with the start and the end token around them."""
    rows = tokenization.encode(Tokenizer.from_file(str(tokenizer)), [document.text for document in documents])
    return tuple(np.array([index["bos_id"], *row, index["eos_id"]], dtype=np.int64) for row in rows)


def token_bytes(tokenizer: Path, documents: Sequence[Document], tokens: Sequence[Ids]) -> tuple[Ids, ...]:
    """Return how many bytes of its document each token stands for [tokens of each document].

    Special tokens stand for none, and so does an unknown token: it does not say what the text was. Where tokens are
    bytes, a token's name has them. Else a token stands for what it covers of the text as it was written, before
    letters were made small or lost their accents, with the blanks before it; so all tokens of a document together
    stand for its bytes, less unknown ones and blanks at its end.

    Args:
        tokenizer: tokenizer.json.
        documents: the texts.
        tokens: their ids between start and end token, or the beginning of these.
    """
    encoder = Tokenizer.from_file(str(tokenizer))
    if _is_of_bytes(encoder):
        sizes = token_sizes(tokenizer)
        return tuple(sizes[ids] for ids in tokens)
    unknown = unknown_id(tokenizer)
    return tuple(
        _covered(encoder, document.text, ids, unknown) for document, ids in zip(documents, tokens, strict=True)
    )


def _covered(encoder: Tokenizer, text: str, ids: Ids, unknown: int | None) -> Ids:
    position = np.cumsum([0, *(len(letter.encode()) for letter in text)])
    behind = np.maximum.accumulate(np.array([0, *tokenization.ends(encoder, text)], dtype=np.int64))
    covered = np.array([0, *np.diff(position[behind]), 0], dtype=np.int64)[: len(ids)]
    return np.where(ids == unknown, 0, covered) if unknown is not None else covered


def _is_of_bytes(encoder: Tokenizer) -> bool:
    return '"ByteLevel"' in json.dumps(json.loads(encoder.to_str())["pre_tokenizer"])


def unknown_id(tokenizer: Path) -> int | None:
    """Return the id that stands for any text the vocabulary has no token for; None where there is no such text."""
    encoder = Tokenizer.from_file(str(tokenizer))
    if _is_of_bytes(encoder):
        return None
    model = json.loads(encoder.to_str())["model"]
    if model.get("byte_fallback"):
        return None
    number: int | None = model.get("unk_id")
    return number if number is not None else encoder.token_to_id(model.get("unk_token") or "")


def token_sizes(tokenizer: Path) -> NDArray[np.int64]:
    """Return how many bytes of text each token stands for [vocabulary]; special tokens stand for none.

    Holds for byte-level vocabularies, in which one character of a token's name is one byte, but for the mark of a
    piece that goes on with a word.
    """
    encoder = Tokenizer.from_file(str(tokenizer))
    special = encoder.get_added_tokens_decoder()
    mark = json.loads(encoder.to_str())["model"].get("continuing_subword_prefix") or ""
    names = [(encoder.id_to_token(i) or "").removeprefix(mark) for i in range(encoder.get_vocab_size())]
    return np.array([0 if i in special else len(name) for i, name in enumerate(names)], dtype=np.int64)


def train_rows(prepared: Path, index: dict[str, Any], max_tokens: int) -> Ids:
    """Return packed train sequences [sequences, length], from the start, with at most `max_tokens` tokens."""
    wanted = max(1, max_tokens // index["sequence_length"])
    rows: list[Ids] = []
    for shard in index["splits"]["train"]["shards"]:
        loaded = np.load(prepared / shard["file"], mmap_mode="r", allow_pickle=False)[:wanted]
        rows.append(loaded.astype(np.int64))
        wanted -= len(loaded)
        if wanted <= 0:
            break
    return np.concatenate(rows)


def check_tokenizer(prepared: Path, model: Path) -> None:
    """Refuse a model whose tokenizer is not the one that its test documents were prepared with.

    Raises:
        IntegrityError: naming both files and both hashes.
    """
    ours, theirs = prepared / "tokenizer" / TOKENIZER, model / TOKENIZER
    hashes = [fingerprint.hash_file(path) if path.is_file() else "(missing)" for path in (ours, theirs)]
    if hashes[0] != hashes[1] or "(missing)" in hashes:
        raise IntegrityError(
            f"{theirs} is not the tokenizer of the prepared data: sha256 {hashes[1]}, expected {hashes[0]} ({ours})",
            hint="evaluate a model with the prepare artifact that it was trained on",
        )


def _document(path: Path, number: int, line: str) -> Document:
    try:
        record = json.loads(line)
        return Document(id=record["id"], text=record["text"], source=record.get("source", ""))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path}, line {number}: not a document record ({error!r})", hint="run prepare again to rebuild it"
        ) from error
