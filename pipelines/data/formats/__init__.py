"""The formats of a corpus. A module is a format: `rows(content)` yields what a file holds, one record at a time.

Adding one is a file here, a line in `pipelines.data.kinds` that knows its first bytes, and a test.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from pipelines.data.config import FieldNames
from pipelines.data.records import Document, Quarantined, Row

Found: TypeAlias = Document | Row | Quarantined
"""What a format yields: a record to be mapped, a document where it knows the fields itself, or why there is none."""

TOO_LONG = "line of more than"
"""How the reason starts when a record is longer than is read."""


@dataclass(frozen=True)
class Content:
    """A file to be read."""

    path: Path
    name: str
    """Relative to the corpus."""
    chunks: Iterator[bytes]
    """Its plain bytes, text in UTF-8; a format that seeks opens `path` itself."""
    fields: FieldNames
    max_bytes: int
    """Longest record."""
    max_expansion: int
    few_texts: bool = False
    """Whether plain texts are so few that each of their parts is a work."""

    def too_long(self, number: int, offset: int) -> Quarantined:
        """Return the record of one that is longer than `max_bytes`."""
        do = f"prepare.max_line_bytes={self.max_bytes * 4} reads records of up to {self.max_bytes * 4:,} bytes"
        return Quarantined(self.name, number, offset, f"{TOO_LONG} {self.max_bytes} bytes", do)


def rows_of(kind: str) -> Callable[[Content], Iterator[Found]]:
    """Return the reader of a format."""
    return importlib.import_module(f"{__name__}.{kind}").rows
