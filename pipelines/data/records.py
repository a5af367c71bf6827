"""One record of the corpus: the fields of a document, and what makes a record unfit to be one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.data.config import FieldNames
from pipelines.data.kinds import ICONV

DAMAGED_SHARD = "damaged shard"
"""How the reason starts when a shard cannot be read to its end: nobody knows how much is missing."""
_NAMED = 12
"""Fields that a message names."""
_NAME_CHARACTERS = 24
_USUAL = ("content", "body", "raw_content", "document", "article", "message", "code")
"""Names that others give the field of the text."""
_MISSING = object()
_DECODER = json.JSONDecoder(parse_constant=lambda _: None)
"""NaN and infinities, which JSON does not have, become null."""


class MalformedRecordError(ValueError):
    """A record is not a document.

    Args:
        reason: a short sentence without the record's content.
        do: what mends it, where a setting does.
    """

    def __init__(self, reason: str, do: str = "") -> None:
        super().__init__(reason)
        self.do = do


@dataclass(frozen=True)
class Document:
    """A document with its origin. `work` groups what must not straddle splits; empty means the document alone."""

    id: str
    text: str
    source: str
    license: str
    work: str
    metadata: str = ""
    """The other fields of its record, as the text of a JSON object; empty where there are none."""

    def to_json(self) -> bytes:
        """Return the document as one line of JSON, newline included."""
        return json.dumps(asdict(self), ensure_ascii=False).encode() + b"\n"


@dataclass(frozen=True)
class Row:
    """A record as its file has it."""

    number: int
    """Counted from 1: of the line, the row or the element."""
    offset: int
    """Byte offset in the decompressed file; 0 where the format has none."""
    fields: dict[str, Any]


@dataclass(frozen=True)
class Quarantined:
    """A record that could not be read: where it starts and why."""

    shard: str
    line: int
    """Counted from 1: the line, the row or the element."""
    offset: int
    """Byte offset in the decompressed shard."""
    reason: str
    do: str = ""
    """What mends it, where a setting does."""


def parse(line: bytes, default_id: str, names: FieldNames | None = None) -> Document:
    """Read one line of JSON as a document.

    Raises:
        MalformedRecordError: with the reason, a short sentence without the line's content.
    """
    return document(load(line), default_id, names or FieldNames())


def document(fields: Mapping[str, Any], default_id: str, names: FieldNames, *, table: bool = False) -> Document:
    """Make a document of a record.

    Args:
        fields: the record.
        default_id: its id where it has none.
        names: which field is what; `a.b` is the field b of the object a, unless there is a field of that whole name.
        table: the record is a row of a table, whose empty cells are empty texts.

    Raises:
        MalformedRecordError: no text, or fields of other types.
    """
    text = look_up(fields, names.text)
    if text is _MISSING:
        raise missing_field(list(fields), names.text, _longest(fields))
    if table and text is None:
        text = ""
    return Document(
        id=_string(fields, names.id, default_id),
        text=_checked(text, names.text),
        source=_string(fields, names.source, "unknown"),
        license=_string(fields, names.license, "unknown"),
        work=_string(fields, names.work, ""),
        metadata=_metadata(fields, names),
    )


def missing_field(there: list[str], wanted: str, likely: str | None = None) -> MalformedRecordError:
    """Return the error of a record or table that lacks the field of the text.

    Args:
        there: the fields that it has; the message names them.
        wanted: the one that it lacks.
        likely: the one that holds the text, as it seems; None looks for a usual name.
    """
    shown = [name[:_NAME_CHARACTERS] for name in there[:_NAMED]]
    named = ", ".join(shown) + (f" and {len(there) - _NAMED} more" if len(there) > _NAMED else "")
    likely = likely or next((name for name in _USUAL if name in there), "NAME")
    do = f"prepare.fields.text={likely[:_NAME_CHARACTERS]} names the field that holds the text"
    return MalformedRecordError(f"no field `{wanted}`; there is {named or 'none'}"[:190], do)


def _longest(fields: Mapping[str, Any]) -> str | None:
    """Return the field with the longest string."""
    strings = {name: len(value) for name, value in fields.items() if isinstance(value, str)}
    return max(strings, key=strings.__getitem__, default=None)


def look_up(fields: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field, nested as in `a.b`, or a mark that there is none (`has` tells)."""
    value = fields.get(name, _MISSING)
    if value is not _MISSING or "." not in name:
        return value
    first, _, rest = name.partition(".")
    inner = fields.get(first)
    return look_up(inner, rest) if isinstance(inner, Mapping) else _MISSING


def has(fields: Mapping[str, Any], name: str) -> bool:
    """Tell whether a record has a field."""
    return look_up(fields, name) is not _MISSING


def load(line: bytes) -> dict[str, Any]:
    """Parse one line of JSON as an object.

    Raises:
        MalformedRecordError: it is none.
    """
    if b"\x00" in line:
        raise MalformedRecordError("NUL byte")
    try:
        record = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MalformedRecordError(f"not UTF-8 at byte {error.start} of the line", ICONV) from None
    except RecursionError:
        raise MalformedRecordError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise MalformedRecordError(f"not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:
        # The interpreter refuses numbers of more than a few thousand digits.
        raise MalformedRecordError(f"not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise MalformedRecordError(f"a {type_name(record)}, not an object")
    return record


def _string(fields: Mapping[str, Any], name: str, default: str) -> str:
    value = look_up(fields, name)
    if value is None or value is _MISSING:
        return default
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return _checked(value, name)


def _checked(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise MalformedRecordError(f"field `{name}` is a {type_name(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedRecordError(f"field `{name}` holds half of a surrogate pair") from None
    return value


def _metadata(fields: Mapping[str, Any], names: FieldNames) -> str:
    """Return the fields that are nothing else as the text of a JSON object."""
    if names.metadata is None:
        used = {names.text, names.id, names.source, names.license, names.work}
        rest = {name: value for name, value in fields.items() if name not in used}
        for name in used:
            if "." in name and name not in fields:
                _without(rest, name)
        _unfold(rest)
    else:
        rest = {name: look_up(fields, name) for name in names.metadata if has(fields, name)}
    if not rest:
        return ""
    try:
        found = json.dumps(rest, ensure_ascii=False, default=str)
        found.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(rest, default=str)  # half of a surrogate pair, as an escape
    except (RecursionError, ValueError):
        return ""  # deeper than can be written, or a number that is too long to be
    return found


def _unfold(fields: dict[str, Any]) -> None:
    """Put the fields of an object `metadata`, as other tools and we ourselves write it, beside the others."""
    inner = fields.get("metadata")
    if isinstance(inner, str):
        try:
            inner = json.loads(inner) if inner else {}
        except (ValueError, RecursionError):
            return
    if isinstance(inner, dict):
        del fields["metadata"]
        fields.update({name: value for name, value in inner.items() if name not in fields})


def _without(fields: dict[str, Any], name: str) -> None:
    """Remove a nested field, leaving the objects around it as they were to others."""
    first, _, rest = name.partition(".")
    inner = fields.get(first)
    if isinstance(inner, Mapping):
        fields[first] = dict(inner)
        if "." in rest and rest not in inner:
            _without(fields[first], rest)
        else:
            fields[first].pop(rest, None)


def type_name(value: object) -> str:
    """Return what JSON calls the type of a value."""
    names = {dict: "object", list: "list", str: "string", int: "number", float: "number", bool: "boolean"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
