"""JSON that is no JSON Lines: an array of objects, or objects one after another over several lines each."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipelines.data.formats import Content, Found
from pipelines.data.records import DAMAGED_SHARD, Quarantined, Row, type_name

_BETWEEN = " \t\r\n,"
_DECODER = json.JSONDecoder(parse_constant=lambda _: None)


def rows(content: Content) -> Iterator[Found]:
    """Yield the objects of the file; nothing after an element that is no JSON, for where the next begins is unknown."""
    text = _Text(content.chunks, content.max_bytes)
    text.skip(_BETWEEN + "\ufeff")
    array = False
    number = 0
    while True:
        text.skip(_BETWEEN)
        if text.at_end:
            return
        if text.take("]" if array else "["):  # several arrays may follow each other
            array = not array
            continue
        number += 1
        try:
            offset, value = text.value()
        except _TooLongError:
            too_long = content.too_long(number, text.offset)
            # Where the next one begins is unknown, so the rest of the file is lost.
            yield replace(too_long, reason=f"{DAMAGED_SHARD}: element {number}: {too_long.reason}")
            return
        except (ValueError, RecursionError) as error:
            reason = f"{DAMAGED_SHARD}: element {number} is not JSON: {error}"[:180]
            yield Quarantined(content.name, number, text.offset, reason)
            return
        if isinstance(value, dict):
            yield Row(number, offset, value)
        else:
            yield Quarantined(content.name, number, offset, f"a {type_name(value)}, not an object")


class _TooLongError(ValueError):
    pass


class _Text:
    """A window over a stream of text, never longer than an element may be."""

    def __init__(self, chunks: Iterator[bytes], limit: int) -> None:
        self._chunks, self._limit = chunks, limit
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._text, self._place = "", 0
        self.offset = 0
        self._ended = False

    @property
    def at_end(self) -> bool:
        return self._place >= len(self._text) and not self._more(1)

    def skip(self, characters: str) -> None:
        while not self.at_end and self._text[self._place] in characters:
            self._go(1)

    def take(self, character: str) -> bool:
        found = not self.at_end and self._text[self._place] == character
        if found:
            self._go(1)
        return found

    def value(self) -> tuple[int, Any]:
        """Return where the next value begins, and the value; reads on until it is whole."""
        wanted = 1 << 16
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError:
                if len(self._text) - self._place > self._limit:
                    raise _TooLongError from None
                if not self._more(wanted):
                    raise
                wanted *= 2
                continue
            if end == len(self._text) and not isinstance(value, (dict, list, str)) and self._more(1):
                continue  # a number may go on
            start = self.offset
            self._go(end - self._place)
            return start, value

    def _go(self, characters: int) -> None:
        self.offset += len(self._text[self._place : self._place + characters].encode("utf-8", "surrogatepass"))
        self._place += characters

    def _more(self, wanted: int) -> bool:
        """Read so many bytes more; return whether there were any."""
        parts, size = [self._text[self._place :]], 0
        while size < wanted and not self._ended:
            chunk = next(self._chunks, b"")
            self._ended = not chunk
            size += len(chunk)
            parts.append(self._decoder.decode(chunk, final=self._ended))
        self._text, self._place = "".join(parts), 0
        return size > 0
