"""Records: any document survives its line of JSON, and no line makes the parser fail in any other way than its own."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.records import Document, MalformedRecordError, parse

text = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.builds(Document, id=text, text=text, source=text, license=text, work=text))
def test_a_document_survives_its_line(document: Document) -> None:
    line = document.to_json()
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert parse(line, default_id="unused") == document


@given(st.binary(max_size=200))
def test_any_bytes_are_a_document_or_malformed(line: bytes) -> None:
    with contextlib.suppress(MalformedRecordError):
        assert isinstance(parse(line, "id"), Document)


@given(st.dictionaries(st.sampled_from(["id", "text", "source", "license", "work", "more"]), json_values))
def test_any_json_object_is_a_document_exactly_when_its_fields_are_strings(record: dict[str, object]) -> None:
    """Reference: `text` is a string; the others are strings, null, or absent; an id may be a whole number."""

    def good(name: str) -> bool:
        value = record.get(name)
        if name == "id" and isinstance(value, int) and not isinstance(value, bool):
            return True
        if value is None:
            return name != "text"
        return isinstance(value, str) and value.encode("utf-8", "replace").decode() == value

    line = json.dumps(record).encode()
    if all(good(name) for name in ("id", "text", "source", "license", "work")):
        assert parse(line, "fallback").text == record["text"]
    else:
        with pytest.raises(MalformedRecordError):
            parse(line, "fallback")


def test_unknown_fields_are_ignored() -> None:
    assert parse(b'{"text": "t", "score": 0.5, "tags": ["x"]}', "id") == Document("id", "t", "unknown", "unknown", "")


def test_the_reason_never_repeats_the_content() -> None:
    with pytest.raises(MalformedRecordError) as caught:
        parse(b'{"text": "secret-token-123', "id")
    assert "secret" not in str(caught.value)
