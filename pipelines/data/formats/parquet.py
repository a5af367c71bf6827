"""Parquet: a row a record, read in small batches so that wide rows do not add up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from pipelines.data.formats import Content, Found
from pipelines.data.kinds import UnreadableError
from pipelines.data.records import DAMAGED_SHARD, Quarantined, Row, missing_field

_ROWS = 64
_SMALL_BYTES = 4 << 20
_TEXTS = {"string", "large_string", "string_view", "binary", "large_binary"}
"""Types of a column of texts; Spark leaves out of some files that the bytes are UTF-8."""
_FREE_BYTES = 256 << 20
"""What a column of a row group may hold, whatever it is compressed to."""


def rows(content: Content) -> Iterator[Found]:
    """Yield the rows of the table.

    Raises:
        UnreadableError: it is damaged from the start, or lacks the column of the text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # As a dictionary, a text that stands in many rows is in memory once.
        leaves = pq.read_metadata(content.path).schema
        paths = [leaves.column(place).path for place in range(len(leaves))]
        text = [path for path in paths if path == content.fields.text]
        table = pq.ParquetFile(content.path, pre_buffer=False, buffer_size=1 << 20, read_dictionary=text)
    except (pa.ArrowException, OSError) as error:
        raise UnreadableError(f"not Parquet that can be read: {error}"[:200]) from None
    with table:
        names = table.schema_arrow.names
        _refuse(table, content)
        number = 0
        try:
            for batch in table.iter_batches(batch_size=_ROWS, columns=_wanted(content, names), use_threads=False):
                for row in itertools.chain.from_iterable(part.to_pylist() for part in _slices(batch)):
                    number += 1
                    cells = {name: _plain(value) for name, value in row.items()}
                    yield Row(number, 0, {k: v for k, v in cells.items() if v is not None or k == content.fields.text})
        except (pa.ArrowException, OSError) as error:
            yield Quarantined(content.name, number + 1, 0, f"{DAMAGED_SHARD}: after row {number}: {error}"[:190])


def _slices(batch: Any) -> Iterator[Any]:
    """Cut a batch so that little of it is in Python at a time."""
    step = batch.num_rows if batch.nbytes < _SMALL_BYTES else 1
    return (batch.slice(start, step) for start in range(0, batch.num_rows, max(step, 1)))


def _plain(value: Any) -> Any:
    """Return bytes that are UTF-8 as the string that they are."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    return value


def _wanted(content: Content, names: list[str]) -> list[str] | None:
    """Return the columns that are read; None for all."""
    fields = content.fields
    if fields.metadata is None:
        return None
    used = (fields.text, fields.id, fields.source, fields.license, fields.work, *fields.metadata)
    return [name for name in names if any(one == name or one.startswith(f"{name}.") for one in used)]


def _refuse(table: Any, content: Content) -> None:
    """Refuse a table without the text, and one whose pages would fill the memory."""
    names = table.schema_arrow.names
    text = content.fields.text
    kind = _type(table.schema_arrow, text)
    if kind not in _TEXTS:
        typed = [f"{field.name} ({field.type})" for field in table.schema_arrow]
        error = missing_field(typed, text)
        why = f"a table with {error}" if kind is None else f"its column `{text}` is {kind}, not strings"
        raise UnreadableError(why, error.do)
    wanted = _wanted(content, names)
    for group in range(table.metadata.num_row_groups):
        for place in range(table.metadata.num_columns):
            column = table.metadata.row_group(group).column(place)
            plain, packed = column.total_uncompressed_size, max(column.total_compressed_size, 1)
            used = wanted is None or column.path_in_schema.partition(".")[0] in wanted
            if used and plain > max(_FREE_BYTES, packed * content.max_expansion):
                raise UnreadableError(
                    f"its column {column.path_in_schema} expands from {packed:,} to {plain:,} bytes",
                    f"if it is meant to, raise prepare.max_expansion ({content.max_expansion})",
                )


def _type(schema: Any, name: str) -> str | None:
    """Return the type of a column, nested as in `a.b`; None where there is none."""
    if name in schema.names:
        found = schema.field(name).type
        return str(found.value_type if hasattr(found, "index_type") else found)
    first, _, rest = name.partition(".")
    if not rest or first not in schema.names:
        return None
    inner = schema.field(first).type
    for part in rest.split("."):
        if not hasattr(inner, "get_field_index") or inner.get_field_index(part) < 0:
            return None
        inner = inner.field(part).type
    return str(inner)
