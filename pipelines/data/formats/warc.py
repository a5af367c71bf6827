"""WARC: web archives. Text records (WET) are documents as they are; of HTML pages the main text is taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pipelines.data.expand import DamagedError
from pipelines.data.formats import Content, Found
from pipelines.data.formats.html import extract
from pipelines.data.records import Document, Quarantined

_HTML = ("text/html", "application/xhtml+xml")


def rows(content: Content) -> Iterator[Found]:
    """Yield a document for each text and page; requests, metadata and pictures are no documents."""
    stream = _Stream(content.chunks)
    last: Found | None = None
    for found in _found(content, stream):
        if last is not None:
            yield last
        last = found
    if stream.damage is not None:  # which may have cut the last one
        raise stream.damage
    if last is not None:
        yield last


def _found(content: Content, stream: Any) -> Iterator[Found]:
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    kinds = WarcRecordType.response | WarcRecordType.conversion | WarcRecordType.resource
    records = ArchiveIterator(stream, record_types=kinds, parse_http=True, auto_decode="all", stream_detect=False)
    for number, record in enumerate(records, start=1):
        mime = (record.http_content_type or record.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
        if mime not in {"text/plain", *_HTML} or (record.is_http and record.http_headers.status_code != 200):
            continue
        body = record.reader.read(content.max_bytes + 1)
        too_long = len(body) > content.max_bytes
        yield (
            content.too_long(number, record.stream_pos) if too_long else _document(content, record, number, body, mime)
        )


def _document(content: Content, record: Any, number: int, body: bytes, mime: str) -> Found:
    if mime in _HTML:
        text = extract(body)
    else:
        try:
            text = body.decode(record.http_charset or "utf-8")
        except (UnicodeDecodeError, LookupError) as error:
            return Quarantined(content.name, number, record.stream_pos, f"not text: {error}"[:150])
    headers = {"url": record.headers.get("WARC-Target-URI"), "date": record.headers.get("WARC-Date")}
    return Document(
        id=record.record_id or f"{content.name}:{number}",
        text=text,
        source=content.name.partition("/")[0] if "/" in content.name else "web",
        license="unknown",
        work="",
        metadata=json.dumps({key: value for key, value in headers.items() if value}, ensure_ascii=False),
    )


class _Stream:
    """A stream of bytes as a file that can be read; damage ends it, and is kept for whoever asks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = chunks, b""
        self._place = 0
        self.damage: DamagedError | None = None

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1, /) -> bytes:
        try:
            while not self._left and (chunk := next(self._chunks, None)) is not None:
                self._left = chunk
        except DamagedError as error:  # not through the library, which has no place for it
            self.damage = error
        found, self._left = (self._left, b"") if size < 0 else (self._left[:size], self._left[size:])
        self._place += len(found)
        return found
