"""Document files: documents come back as they went in, and a file that was cut is not read as a shorter one."""

from __future__ import annotations

from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.document_files import DocumentWriter, documents
from pipelines.data.records import Document

texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=50)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.builds(Document, id=texts, text=texts, source=texts, license=texts, work=texts), max_size=8))
def test_documents_survive_the_round_trip(tmp_path_factory: pytest.TempPathFactory, written: list[Document]) -> None:
    path = tmp_path_factory.mktemp("documents") / "folder" / "a.jsonl.zst"
    with DocumentWriter(path) as writer:
        for document in written:
            writer.write(document)
    assert list(documents(path)) == written


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    with DocumentWriter(path) as writer:
        for number in range(200):
            writer.write(Document(str(number), f"text {number * 7919}", "s", "l", "w"))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises((zstandard.ZstdError, ValueError)):
        list(documents(path))
