"""Reading the corpus: JSON Lines shards, plain, gzip or zstd, streamed in bounded memory.

A line that is not a document becomes a `Quarantined` record and reading goes on at the next line. A byte-order mark at
the start of a shard and CRLF line ends are accepted. Raw bytes are hashed as they pass, so a corpus that is replaced
while it is read is noticed.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import zstandard

from pipelines.core.errors import IntegrityError
from pipelines.data.records import Document, MalformedRecordError, Quarantined, parse

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
READ_BYTES = 16 << 10
"""Compressed bytes per read: small, so that what they expand to stays small too."""
DAMAGED_SHARD = "damaged shard"
"""How the reason starts when a shard cannot be decompressed to its end: nobody knows how much is missing."""
_BOM = b"\xef\xbb\xbf"


class _Decompressor(Protocol):
    """What zlib's and zstandard's decompression objects share."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def shards(folder: Path) -> list[Path]:
    """Return the shards of a corpus in the order they are read.

    Raises:
        IntegrityError: there is none.
    """
    corpus = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.name.endswith(SUFFIXES))
    if not corpus:
        raise IntegrityError(
            f"{folder} holds no corpus: no file ends in {', '.join(SUFFIXES)}",
            hint="add JSON Lines with the fields id, text, source, license, then `ingot data add`",
        )
    return corpus


def read(
    folder: Path, *, max_line_bytes: int, md5: Mapping[str, str] | None = None
) -> Iterator[Document | Quarantined]:
    """Yield every record of the corpus in order: a document, or why there is none.

    Args:
        folder: the corpus.
        max_line_bytes: a longer line is quarantined and never held in memory.
        md5: name relative to `folder` -> expected md5 of the file's bytes; files not named are not checked.

    Raises:
        IntegrityError: no shards, or a shard whose bytes are not the expected ones.
    """
    for path in shards(folder):
        name = path.name if path == folder else path.relative_to(folder).as_posix()
        yield from _read_shard(path, name, max_line_bytes, (md5 or {}).get(name))


def _read_shard(path: Path, name: str, max_line_bytes: int, md5: str | None) -> Iterator[Document | Quarantined]:
    hasher = hashlib.md5(usedforsecurity=False)
    end = 0
    number = 0
    try:
        for number, (offset, line) in enumerate(_lines(_expand(path, hasher), max_line_bytes), start=1):
            end = offset + (len(line) if line is not None else 0)
            if line is None:
                yield Quarantined(name, number, offset, f"line of more than {max_line_bytes} bytes")
            elif line.strip():
                yield _record(line, name, number, offset)
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        yield Quarantined(name, number + 1, end, f"{DAMAGED_SHARD}: {error}")
    if md5 is not None and hasher.hexdigest() != md5:
        raise IntegrityError(
            f"{path} changed while it was read: expected md5 {md5}, found {hasher.hexdigest()}",
            hint="`ingot data pull` restores the corpus that data.dvc names; then run again",
        )


def _record(line: bytes, shard: str, number: int, offset: int) -> Document | Quarantined:
    try:
        return parse(line.removeprefix(_BOM) if offset == 0 else line, default_id=f"{shard}:{number}")
    except MalformedRecordError as error:
        return Quarantined(shard, number, offset, str(error))


def _lines(chunks: Iterator[bytes], max_line_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (byte offset, line without its end); None stands for a line that is too long to hold."""
    pending = bytearray()
    start = 0
    skipped = 0
    for chunk in chunks:
        for index, piece in enumerate(chunk.split(b"\n")):
            if index:
                yield start, None if skipped else bytes(pending)
                start += skipped + len(pending) + 1
                skipped = 0
                pending.clear()
            pending += piece
            if skipped or len(pending) > max_line_bytes:
                skipped += len(pending)
                pending.clear()
    if skipped or pending:
        yield start, None if skipped else bytes(pending)


def _expand(path: Path, hasher: hashlib._Hash) -> Iterator[bytes]:
    """Yield the decompressed bytes of a shard, hashing the raw ones to the end also when decompression fails."""
    raw = _hashed(path, hasher)
    try:
        yield from raw if path.name.endswith(".jsonl") else _decompressed(raw, path)
    except (zlib.error, zstandard.ZstdError):
        for _ in raw:
            pass
        raise


def _hashed(path: Path, hasher: hashlib._Hash) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(READ_BYTES):
            hasher.update(chunk)
            yield chunk


def _decompressed(raw: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """Yield the content of all frames (zstd) or members (gzip); a cut one raises EOFError."""
    current = _decompressor(path)
    fresh = True
    for chunk in raw:
        data = chunk
        while data:
            yield current.decompress(data)
            fresh = False
            data = b""
            if current.eof:
                data = current.unused_data
                current, fresh = _decompressor(path), True
    if not fresh:
        raise EOFError("it ends in the middle")


def _decompressor(path: Path) -> _Decompressor:
    if path.name.endswith(".gz"):
        return zlib.decompressobj(wbits=31)
    return zstandard.ZstdDecompressor().decompressobj()
