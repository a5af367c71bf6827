"""Identity: one text per value, refusal of what has none, and differences by field."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.core import fingerprint
from pipelines.core.fingerprint import canonical_json, digest, explain, hash_file

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
RECORDS = st.dictionaries(st.text(min_size=1, max_size=4), VALUES, max_size=4)


def shuffled(value: Any, seed: int) -> Any:
    """The same value with the keys of every mapping in another order, and lists as tuples."""
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: hashlib.sha256(f"{seed}{key!r}".encode()).digest())
        return {key: shuffled(value[key], seed) for key in keys}
    return tuple(shuffled(child, seed) for child in value) if isinstance(value, list) else value


@given(VALUES, st.integers())
def test_the_order_of_keys_and_the_kind_of_sequence_do_not_matter(value: Any, seed: int) -> None:
    assert canonical_json(shuffled(value, seed)) == canonical_json(value)


@given(VALUES)
def test_canonical_json_is_ascii_and_reads_back_as_the_value(value: Any) -> None:
    text = canonical_json(value)
    assert text.isascii()
    assert json.loads(text) == value


@given(VALUES, VALUES)
def test_digests_agree_exactly_when_the_texts_do(first: Any, second: Any) -> None:
    assert (digest(first) == digest(second)) == (canonical_json(first) == canonical_json(second))


def test_the_digest_is_the_plain_sha256_of_the_text() -> None:
    assert digest({"b": [1, 2.5], "a": "é"}) == hashlib.sha256(b'{"a":"\\u00e9","b":[1,2.5]}').hexdigest()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_non_finite_number_is_refused_by_its_path(number: float) -> None:
    with pytest.raises(TypeError, match=r"config\.lr\.1 is .*non-finite"):
        canonical_json({"config": {"lr": [0.0, number]}})


@pytest.mark.parametrize("thing", [object(), Path("x"), {1, 2}, b"bytes", len, int, 1j])
def test_what_has_no_stable_form_is_refused_by_its_path_and_type(thing: Any) -> None:
    with pytest.raises(TypeError, match=rf"inputs\.model is a {type(thing).__name__}, which has no stable JSON form"):
        canonical_json({"inputs": {"model": thing}})


def test_a_key_that_is_no_string_is_refused() -> None:
    """JSON would turn 1 into "1", and two different values would share a digest."""
    with pytest.raises(TypeError, match=r"shards has the key 1"):
        canonical_json({"shards": {1: "a"}})


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_files_are_hashed_whole(tmp_path: Path, size: int) -> None:
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "f").write_bytes(content)
    assert hash_file(tmp_path / "f") == hashlib.sha256(content).hexdigest()


@given(RECORDS)
def test_a_value_does_not_differ_from_itself(value: dict[str, Any]) -> None:
    assert explain(value, shuffled(value, 1)) == []


@given(RECORDS, RECORDS)
def test_explain_names_every_difference_from_either_side(old: dict[str, Any], new: dict[str, Any]) -> None:
    there = {change.path: (change.old, change.new) for change in explain(old, new)}
    back = {change.path: (change.new, change.old) for change in explain(new, old)}
    assert there == back


def test_explain_gives_dotted_paths_in_order_with_both_values() -> None:
    old = {"config": {"method": "rtn", "bits": 8, "layers": [1, 2]}, "version": 1}
    new = {"config": {"method": "gptq", "bits": 8, "layers": [1, 3], "group": 32}, "version": 1}
    assert [str(change) for change in explain(old, new)] == [
        "config.group: (absent) -> 32",
        "config.layers.1: 2 -> 3",
        'config.method: "rtn" -> "gptq"',
    ]


def test_explain_sees_an_empty_section_appear_and_go() -> None:
    assert [str(change) for change in explain({"a": {}}, {})] == ["a: {} -> (absent)"]
    assert [str(change) for change in explain({"a": {}}, {"a": {"b": 1}})] == [
        "a: {} -> (absent)",
        "a.b: (absent) -> 1",
    ]


def test_explain_tells_null_from_absent() -> None:
    (change,) = explain({"clip": None}, {})
    assert str(change) == "clip: null -> (absent)"


@pytest.mark.parametrize(("old", "new"), [(True, 1), (0, False), (1, 1.0)])
def test_explain_finds_a_difference_wherever_the_digests_differ(old: Any, new: Any) -> None:
    """1 == True == 1.0 in Python, but not in JSON: a stale stage must have a reason to show."""
    assert digest({"x": old}) != digest({"x": new})
    assert [change.path for change in explain({"x": old}, {"x": new})] == ["x"]


def test_missing_is_not_a_value_that_a_recipe_could_hold() -> None:
    assert fingerprint._MISSING not in (None, "", False, 0)
