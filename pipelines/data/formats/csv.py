"""Tables as text: a header and a row a record, cut by the separator that gives the header the text."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator

from pipelines.data.formats import Content, Found
from pipelines.data.formats.lines import lines
from pipelines.data.kinds import UnreadableError
from pipelines.data.records import DAMAGED_SHARD, Quarantined, Row, missing_field

_SEPARATORS = ("\t", ",", ";", "|")


def rows(content: Content) -> Iterator[Found]:
    """Yield the rows below the header.

    Raises:
        UnreadableError: the header lacks the column of the text; the message names those that are there.
    """
    csv.field_size_limit(content.max_bytes)
    table = _Lines(content)
    header = next(table, "")
    while header and not header.strip():
        header = next(table, "")
    separator, columns = _columns(header.rstrip("\r\n"), content.fields.text)
    reader = csv.reader(table, delimiter=separator, strict=True)
    number = 1
    while True:
        yield from table.bad()
        number += 1
        offset = table.offset
        try:
            cells = next(reader)
        except StopIteration:
            yield from table.bad()
            return
        except csv.Error as error:
            # A quote that is never closed takes the rest of the file into one cell.
            lost = f"{DAMAGED_SHARD}: a quote is never closed" if "unexpected end" in str(error) else str(error)
            bad = Quarantined(content.name, number, offset, lost)
            yield content.too_long(number, offset) if "field limit" in str(error) else bad
            continue
        if len(cells) == len(columns):
            yield Row(number, offset, dict(zip(columns, cells, strict=True)))
        elif cells:
            reason = f"a row of {len(cells)} cells under a header of {len(columns)}"
            yield Quarantined(content.name, number, offset, reason)


def _columns(header: str, text: str) -> tuple[str, list[str]]:
    tables = {separator: next(csv.reader([header], delimiter=separator), []) for separator in _SEPARATORS}
    for separator, columns in tables.items():
        if text in columns:
            return separator, columns
    widest = max(tables.values(), key=len)
    error = missing_field(widest, text)
    raise UnreadableError(f"a table with {error}", error.do)


class _Lines:
    """Lines with their ends, as csv wants them; lines that cannot be read are kept aside."""

    def __init__(self, content: Content) -> None:
        self._content = content
        self._lines = lines(content.chunks, content.max_bytes)
        self._bad: list[Quarantined] = []
        self._number = 0
        self.offset = 0
        """Of the next line."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            offset, line = next(self._lines)
            self._number += 1
            if line is None:
                self._bad.append(self._content.too_long(self._number, offset))
                continue
            self.offset = offset + len(line) + 1
            try:
                text = line.removeprefix(codecs.BOM_UTF8 if offset == 0 else b"").decode("utf-8")
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 at byte {error.start} of the line"
                self._bad.append(Quarantined(self._content.name, self._number, offset, reason))
                continue
            return text + "\n"

    def bad(self) -> list[Quarantined]:
        """Return the lines that could not be read since the last call."""
        bad, self._bad = self._bad, []
        return bad
