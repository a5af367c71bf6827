"""Documents on disk: zstd-compressed JSON Lines, written and read as streams."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import zstandard

from pipelines.data.records import Document

_LEVEL = 3


class DocumentWriter:
    """Writes documents to one file; a context manager.

    Args:
        path: the file; its folder is created.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._stream = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).stream_writer(self._file)

    def write(self, document: Document) -> None:
        """Append one document."""
        self._stream.write(document.to_json())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing the stream writes the frame's end and closes the file below it.
        self._stream.close()


def documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a file that `DocumentWriter` wrote."""
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8", newline="\n"):
            yield Document(**json.loads(line))
