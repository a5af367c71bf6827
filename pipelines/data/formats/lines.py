"""Lines of bounded length out of a stream of bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator


def lines(chunks: Iterator[bytes], max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (byte offset, line without its end); None stands for a line that is too long to hold.

    Lines end with LF or CRLF; where the first piece of the stream has CR alone, as old Macintoshes wrote, it ends them.
    """
    head = next(chunks, b"")
    end = b"\r" if b"\r" in head and b"\n" not in head else b"\n"
    yield from cut(itertools.chain([head], chunks), end, max_bytes)


def cut(chunks: Iterator[bytes], end: bytes, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (byte offset, line without its end) of a stream that is cut at `end`; see `lines`."""
    pending = bytearray()
    start = 0
    skipped = 0
    for chunk in chunks:
        for index, piece in enumerate(chunk.split(end)):
            if index:
                yield start, None if skipped else bytes(pending)
                start += skipped + len(pending) + 1
                skipped = 0
                pending.clear()
            pending += piece
            if skipped or len(pending) > max_bytes:
                skipped += len(pending)
                pending.clear()
    if skipped or pending:
        yield start, None if skipped else bytes(pending)
