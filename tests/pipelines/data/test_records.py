"""Records: any document survives its line of JSON, and no line makes the parser fail in any other way than its own."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.config import FieldNames
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
    """Reference: `text` is a string; the others are strings, numbers, null, or absent."""

    def good(name: str) -> bool:
        value = record.get(name)
        if value is None:
            return name != "text"
        if name != "text" and isinstance(value, (int, float)) and not isinstance(value, bool):
            return True
        return isinstance(value, str) and value.encode("utf-8", "replace").decode() == value

    line = json.dumps(record).encode()
    if all(good(name) for name in ("id", "text", "source", "license", "work")):
        assert parse(line, "fallback").text == record["text"]
    else:
        with pytest.raises(MalformedRecordError):
            parse(line, "fallback")


def test_other_fields_are_kept_as_metadata() -> None:
    found = parse(b'{"text": "t", "score": 0.5, "tags": ["x"], "bad": NaN, "half": "\\ud800"}', "id")
    assert found == Document("id", "t", "unknown", "unknown", "", found.metadata)
    assert json.loads(found.metadata) == {"score": 0.5, "tags": ["x"], "bad": None, "half": "\ud800"}
    assert json.loads(found.to_json())["metadata"] == found.metadata


def test_an_object_of_metadata_is_not_put_into_another() -> None:
    found = parse(b'{"text": "t", "metadata": {"url": "u"}, "score": 1}', "id")
    assert json.loads(found.metadata) == {"score": 1, "url": "u"}
    assert parse(found.to_json(), "id") == found


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"text": "a.b"}, ("0", "inner", "unknown", {"a": {"c": 1}, "a.c": "whole", "url": "u"})),
        ({"text": "a.c", "id": "url"}, ("u", "whole", "unknown", {"a": {"b": "inner", "c": 1}, "id": 0})),
        ({"text": "a.b", "source": "url", "metadata": ("a.c", "none")}, ("0", "inner", "u", {"a.c": "whole"})),
        ({"text": "a.b", "metadata": ()}, ("0", "inner", "unknown", {})),
    ],
)
def test_fields_go_by_the_names_that_a_recipe_gives(names: dict[str, Any], expected: tuple[Any, ...]) -> None:
    """A field of the whole name comes before one within an object."""
    line = b'{"id": 0, "a": {"b": "inner", "c": 1}, "a.c": "whole", "url": "u"}'
    found = parse(line, "none", FieldNames(**names))
    assert (found.id, found.text, found.source, json.loads(found.metadata or "{}")) == expected


def test_a_missing_text_is_told_with_the_fields_that_are_there_and_the_setting_that_helps() -> None:
    with pytest.raises(MalformedRecordError, match="no field `text`; there is url, story") as caught:
        parse(b'{"url": "u", "story": "a much longer one"}', "id")
    assert caught.value.do == "prepare.fields.text=story names the field that holds the text"


def test_the_reason_never_repeats_the_content() -> None:
    with pytest.raises(MalformedRecordError) as caught:
        parse(b'{"text": "secret-token-123', "id")
    assert "secret" not in str(caught.value)
