"""Plain text: a file is a document.

One of more than 20,000 characters is cut between paragraphs into several, which belong to one work where there are
files enough for a split into train, validation and test; else every part is a work by itself.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator

from pipelines.data.formats import Content, Found
from pipelines.data.formats.lines import lines
from pipelines.data.kinds import ICONV
from pipelines.data.records import Document, Quarantined

PART_CHARACTERS = 20_000
"""Length from which a text is cut: a chapter, not a book, so that near-duplicates and splits find their way."""
FEW_FILES = 20


def rows(content: Content) -> Iterator[Found]:
    """Yield the text, whole or in its parts; the first folder of its path is its source."""
    bad: list[Quarantined] = []
    parts = _parts(_decoded(content, bad))
    first = next(parts, None)
    second = next(parts, None)
    if first is not None:
        several = itertools.chain([first], [] if second is None else [second], parts)
        for number, part in enumerate(several, start=1):
            yield from bad
            bad.clear()
            yield document(content, part, None if second is None else number)
    yield from bad


def document(content: Content, text: str, number: int | None) -> Document:
    """Return a text, or a part of it, as a document."""
    identity = content.name if number is None else f"{content.name}#{number}"
    source = content.name.partition("/")[0] if "/" in content.name else "text"
    work = identity if content.few_texts else content.name
    return Document(id=identity, text=text, source=source, license="unknown", work=work)


def _decoded(content: Content, bad: list[Quarantined]) -> Iterator[str]:
    for number, (offset, line) in enumerate(lines(content.chunks, content.max_bytes), start=1):
        if line is None:
            bad.append(content.too_long(number, offset))
            continue
        try:
            text = line.removesuffix(b"\r").removeprefix(codecs.BOM_UTF8 if offset == 0 else b"").decode("utf-8")
        except UnicodeDecodeError as error:
            do = ICONV
            bad.append(Quarantined(content.name, number, offset, f"not UTF-8 at byte {error.start} of the line", do))
            continue
        yield text


def _parts(text: Iterator[str]) -> Iterator[str]:
    """Yield lines in parts of about `PART_CHARACTERS`, cut at blank lines, or anywhere where there are none."""
    part: list[str] = []
    size = since_blank = 0
    for line in text:
        if not line.strip():
            since_blank = 0
            if size > PART_CHARACTERS:
                yield "\n".join(part)
                part, size = [], 0
                continue
        elif size > PART_CHARACTERS and since_blank > PART_CHARACTERS:
            yield "\n".join(part)
            part, size, since_blank = [], 0, 0
        part.append(line)
        size += len(line) + 1
        since_blank += len(line) + 1
    if size and any(line.strip() for line in part):
        yield "\n".join(part)
