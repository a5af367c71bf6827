"""JSON Lines: an object a line.

A line that is none is quarantined and reading goes on at the next. A byte-order mark may stand before any line, for
files with one are joined with `cat`.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from pipelines.data.formats import Content, Found
from pipelines.data.formats.lines import lines
from pipelines.data.records import MalformedRecordError, Quarantined, Row, load


def rows(content: Content) -> Iterator[Found]:
    """Yield the objects of the file."""
    number = 0
    for offset, line in lines(content.chunks, content.max_bytes):
        number += 1
        if line is None:
            yield content.too_long(number, offset)
            continue
        # JSON has no bare CR within a line: where lines of both kinds are mixed, it ends one.
        for piece in line.removesuffix(b"\r").split(b"\r") if b"\r" in line else (line,):
            bare = piece.removeprefix(codecs.BOM_UTF8)
            if not bare.strip():
                continue
            try:
                yield Row(number, offset, load(bare))
            except MalformedRecordError as error:
                yield Quarantined(content.name, number, offset, str(error), error.do)
