"""One record of the corpus: the fields of a document, and what makes a line unfit to be one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


class MalformedRecordError(ValueError):
    """A line is not a document; the message is the reason that enters the quarantine file."""


@dataclass(frozen=True)
class Document:
    """A document with its origin. `work` groups what must not straddle splits; empty means the document alone."""

    id: str
    text: str
    source: str
    license: str
    work: str

    def to_json(self) -> bytes:
        """Return the document as one line of JSON, newline included."""
        return json.dumps(asdict(self), ensure_ascii=False).encode() + b"\n"


@dataclass(frozen=True)
class Quarantined:
    """A record that could not be read: where it starts and why."""

    shard: str
    line: int
    """Counted from 1."""
    offset: int
    """Byte offset of the line in the decompressed shard."""
    reason: str


def parse(line: bytes, default_id: str) -> Document:
    """Read one line of JSON as a document.

    Raises:
        MalformedRecordError: with the reason, a short sentence without the line's content.
    """
    record = _load(line)
    if not isinstance(record, dict):
        raise MalformedRecordError(f"a {_type(record)}, not an object")
    if "text" not in record:
        raise MalformedRecordError("no field `text`")
    if isinstance(record.get("id"), int) and not isinstance(record["id"], bool):
        record["id"] = str(record["id"])
    return Document(
        id=_string(record, "id", default_id),
        text=_string(record, "text", ""),
        source=_string(record, "source", "unknown"),
        license=_string(record, "license", "unknown"),
        work=_string(record, "work", ""),
    )


def _load(line: bytes) -> Any:
    if b"\x00" in line:
        raise MalformedRecordError("NUL byte")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MalformedRecordError(f"not UTF-8 at byte {error.start} of the line") from None
    except RecursionError:
        raise MalformedRecordError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise MalformedRecordError(f"not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:
        # The interpreter refuses numbers of more than a few thousand digits.
        raise MalformedRecordError(f"not JSON that can be read: {error}") from None


def _string(record: dict[str, Any], name: str, default: str) -> str:
    value = record.get(name, default)
    if value is None and name != "text":
        return default
    if not isinstance(value, str):
        raise MalformedRecordError(f"field `{name}` is a {_type(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedRecordError(f"field `{name}` holds half of a surrogate pair") from None
    return value


def _type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", int: "number", float: "number", bool: "boolean"}
    return "null" if value is None else names[type(value)]
