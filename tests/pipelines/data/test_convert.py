"""A folder of texts becomes a corpus, and nothing is left out in silence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.data import convert, reader
from pipelines.data.records import Document

PARAGRAPH = "A paragraph of some words that stands for many others like it, no two of them quite the same."


def written(target: Path) -> list[Document]:
    records = list(reader.read(target, max_line_bytes=1 << 20))
    assert all(isinstance(record, Document) for record in records)
    return [record for record in records if isinstance(record, Document)]


def parquet(path: Path, **columns: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "texts of 100%"
    (folder / "letters").mkdir(parents=True)
    (folder / "letters" / "one.txt").write_text("\ufeffDear reader,\r\nhow are you?", encoding="utf-8")
    (folder / "notes.md").write_text("# Notes\n\nnothing yet")
    (folder / "records.jsonl").write_text(json.dumps({"text": "a record"}) + "\n")
    (folder / "more.jsonl.zst").write_bytes(zstandard.compress(b'{"id": "m", "text": "another"}\n'))
    parquet(folder / "table.parquet", text=["a row", "a second"], id=[7, 8], work=["w", None])
    return folder


def test_each_kind_is_read(source: Path, tmp_path: Path) -> None:
    taken = convert.convert(source, tmp_path / "data")
    documents = {document.id: document for document in written(tmp_path / "data")}
    assert {d.text.replace("\r\n", "\n") for d in documents.values()} == {
        *("Dear reader,\nhow are you?", "# Notes\n\nnothing yet", "a record", "another", "a row", "a second")
    }
    assert (documents["7"].work, documents["8"].work) == ("w", "")
    assert (documents["letters/one.txt"].source, documents["notes.md"].source) == ("letters", "text")
    assert dict(taken.files) == {"plain text": 2, "JSON Lines": 2, "Parquet": 1}
    assert taken.left_out == []


def test_json_lines_stay_the_bytes_they_are(source: Path, tmp_path: Path) -> None:
    convert.convert(source, tmp_path / "data")
    for name in ("records.jsonl", "more.jsonl.zst"):
        assert (tmp_path / "data" / name).read_bytes() == (source / name).read_bytes()


def test_the_same_source_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert.convert(source, tmp_path / name)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two


def test_what_is_not_taken_is_named_with_its_reason(source: Path, tmp_path: Path) -> None:
    (source / "picture.png").write_bytes(b"png")
    (source / ".hidden").write_text("x")
    (source / ".git").mkdir()
    (source / "nothing.txt").write_text("")
    (source / "old.txt").write_bytes("caf\xe9".encode("latin-1"))
    (source / "wrong.jsonl").write_text('{"content": "x"}\n')
    (source / "dangling.txt").symlink_to(tmp_path / "nowhere")
    (source / "circle").symlink_to(source)
    (source / "fake.parquet").write_text("no")
    parquet(source / "numbers.parquet", label=[1, 2])
    parquet(source / "gaps.parquet", text=["here", None], id=["g1", "g2"])
    taken = convert.convert(source, tmp_path / "data")
    reasons = dict(taken.left_out)
    assert set(reasons) == {
        *("picture.png", ".hidden", ".git/", "nothing.txt", "old.txt", "wrong.jsonl", "dangling.txt", "circle/"),
        *("fake.parquet", "numbers.parquet", "gaps.parquet, id g2"),
    }
    assert "`text`" in reasons["wrong.jsonl"]
    assert "label (int64)" in reasons["numbers.parquet"]
    said = "\n".join(convert.summary(taken))
    assert all(reason in said for reason in reasons.values())


@pytest.mark.parametrize("files", [2, 30])
def test_a_long_text_is_cut_between_paragraphs(files: int, tmp_path: Path) -> None:
    """With many files its parts stay together; with few they must be works of their own, or no split exists."""
    source = tmp_path / "books"
    source.mkdir()
    text = "\n\n".join(f"{PARAGRAPH} {number}" for number in range(900))
    for number in range(files):
        (source / f"{number:02}.txt").write_text(text if number == 0 else PARAGRAPH)
    taken = convert.convert(source, tmp_path / "data")
    parts = [document for document in written(tmp_path / "data") if document.id.startswith("00.txt")]
    assert "\n\n".join(part.text for part in parts) == text
    assert max(len(part.text) for part in parts) <= 20_000 < len(text)
    assert len({part.work for part in parts}) == (1 if files == 30 else len(parts))
    assert taken.cut == 1


def test_one_file_is_a_corpus_too(source: Path, tmp_path: Path) -> None:
    convert.convert(source / "table.parquet", tmp_path / "data")
    assert [document.id for document in written(tmp_path / "data")] == ["7", "8"]


def test_a_source_without_texts_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"1 x \.png: not a format that is read"):
        convert.convert(tmp_path / "pictures", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_damaged_table_stops_it_half_read(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", text=[f"{PARAGRAPH} {n}" for n in range(5000)])
    damaged = bytearray(path.read_bytes())
    damaged[100:4000] = b"\0" * 3900
    path.write_bytes(bytes(damaged))
    with pytest.raises(IntegrityError, match="is damaged after row"):
        convert.convert(path, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_converted_texts_overwrite_no_file_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    own = zstandard.compress(b'{"text": "mine"}\n')
    (tmp_path / "s" / "converted.jsonl.zst").write_bytes(own)
    (tmp_path / "s" / "a.txt").write_text("text")
    convert.convert(tmp_path / "s", tmp_path / "data")
    assert (tmp_path / "data" / "converted.jsonl.zst").read_bytes() == own
    assert {document.text for document in written(tmp_path / "data")} == {"mine", "text"}
