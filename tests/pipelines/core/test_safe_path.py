"""Names from elsewhere stay below their folder, whatever they try."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.core.errors import IntegrityError
from pipelines.core.safe_path import safe_join


@pytest.mark.parametrize("name", ["a.txt", "a/b.txt", "./a", "a//b", "a b", "..a", "a..", "C:\\x", "%2e%2e/x", "é#?'"])
def test_a_plain_name_is_joined(name: str) -> None:
    assert safe_join(Path("/store"), name, said_by="it") == Path("/store") / name


@pytest.mark.parametrize("name", ["", ".", "..", "/", "//etc", "/etc/passwd", "../x", "a/../../x", "a/..", "a\0b"])
def test_a_name_that_leads_out_is_refused_with_where_it_stands(name: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        safe_join(Path("/store"), name, said_by="s3://b/list.json")
    assert caught.value.message.startswith(f"s3://b/list.json names the file {name!r}")
    assert caught.value.hint


@given(st.text(st.sampled_from("./\\a\0~:%"), max_size=12))
def test_no_name_leads_out(name: str) -> None:
    root = Path("/store/folder")
    try:
        path = safe_join(root, name, said_by="it")
    except IntegrityError:
        return
    normal = Path(str(path.resolve()))
    assert normal != root
    assert normal.is_relative_to(root)
