"""A file is read for what it is, whatever it is called, or named for what it is."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipelines.core.errors import IntegrityError
from pipelines.data import reader
from pipelines.data.config import PrepareConfig
from pipelines.data.records import DAMAGED_SHARD, Document, Quarantined

ROWS = [{"id": str(number), "text": f"text {number}", "score": number / 2} for number in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
RAW = LINES.encode()
WET = (
    b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Record-ID: <urn:uuid:1>\r\nWARC-Target-URI: http://a.org/\r\n"
    b"Content-Type: text/plain\r\nContent-Length: 10\r\n\r\nplain text\r\n\r\n"
)
PAGE = b"<!DOCTYPE html>\n<html><body><script>evil()</script><p>the text of a page</p></body></html>"


def response(body: bytes, mime: bytes = b"text/html", status: bytes = b"200 OK") -> bytes:
    http = b"HTTP/1.1 " + status + b"\r\nContent-Type: " + mime + b"\r\n\r\n" + body
    head = b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:2>\r\nWARC-Target-URI: http://b.org/\r\n"
    return (
        head
        + b"Content-Type: application/http; msgtype=response\r\nContent-Length: %d\r\n\r\n" % len(http)
        + http
        + b"\r\n\r\n"
    )


def parquet(**columns: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def read(folder: Path, **settings: Any) -> list[Document]:
    records = list(reader.read(folder, PrepareConfig(**settings)))
    assert all(isinstance(record, Document) for record in records), records
    return [record for record in records if isinstance(record, Document)]


def pretty(rows: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row, indent=2) for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gzip.jsonl", gzip.compress(RAW)),
        ("zstd.jsonl.gz", zstandard.compress(RAW)),
        ("padded.jsonl.gz", gzip.compress(RAW) + bytes(1000)),
        ("members.jsonl.gz", gzip.compress(RAW[:30]) + bytes(7) + gzip.compress(RAW[30:])),
        ("UPPER.JSONL", RAW),
        ("other.ndjson", RAW),
        ("no-suffix", RAW),
        ("streams.jsonl.bz2", bz2.compress(RAW[:50]) + bz2.compress(RAW[50:])),
        ("streams.jsonl.xz", lzma.compress(RAW[:50]) + bytes(8) + lzma.compress(RAW[50:])),
        ("old.jsonl.lzma", lzma.compress(RAW, format=lzma.FORMAT_ALONE)),
        ("skippable.jsonl.zst", b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.compress(RAW)),
        ("twice.jsonl", gzip.compress(zstandard.compress(RAW))),
        ("utf16.jsonl", LINES.encode("utf-16")),
        ("utf16-be.jsonl", codecs.BOM_UTF16_BE + LINES.encode("utf-16-be")),
        ("no-mark.jsonl", LINES.encode("utf-16-le")),
        ("utf32.jsonl.gz", gzip.compress(LINES.encode("utf-32"))),
        ("array.json", json.dumps(ROWS).encode()),
        ("array.jsonl", json.dumps(ROWS, indent=1).encode()),
        ("array-with-mark.json", codecs.BOM_UTF8 + json.dumps(ROWS).encode()),
        ("pretty.jsonl", pretty(ROWS).encode()),
        ("arrays.json", (json.dumps(ROWS[:2]) + "\n" + json.dumps(ROWS[2:])).encode()),
        ("bytes.parquet", parquet(id=[r["id"] for r in ROWS], text=[str(r["text"]).encode() for r in ROWS])),
        ("cr.jsonl", RAW.replace(b"\n", b"\r")),
        ("mixed.jsonl", RAW.replace(b"\n", b"\r", 2)),
        ("crlf.jsonl", RAW.replace(b"\n", b"\r\n")),
        ("joined.jsonl", b"".join(codecs.BOM_UTF8 + line for line in RAW.splitlines(keepends=True))),
        ("table.parquet", parquet(**{key: [row[key] for row in ROWS] for key in ROWS[0]})),
        ("parquet.jsonl", parquet(**{key: [row[key] for row in ROWS] for key in ROWS[0]})),
        ("part.jsonl/part-0000", RAW),
        ("table.csv", b"id,text,score\n" + b"".join(b'%d,"text %d",%.1f\n' % (n, n, n / 2) for n in range(5))),
        ("table.tsv.gz", gzip.compress(b"id\ttext\r\n" + b"".join(b"%d\ttext %d\r\n" % (n, n) for n in range(5)))),
        ("semicolons.csv", b"score;text;id\n" + b"".join(b"x;text %d;%d\n" % (n, n) for n in range(5))),
    ],
)
def test_records_are_the_same_under_any_name_compression_encoding_and_format(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    assert [(document.id, document.text) for document in read(tmp_path)] == [(r["id"], r["text"]) for r in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("empty.jsonl.gz", b"", "empty"),
        ("empty-inside.jsonl.gz", gzip.compress(b""), "empty"),
        ("blank.jsonl", b"\n \n\r\n", "blank"),
        ("._a.jsonl", b"\0\x05\x16\x07" + bytes(80), "AppleDouble"),
        (".DS_Store", b"\0\0\0\1Bud1", "a hidden file"),
        ("lfs.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        ("error.jsonl", PAGE, r'an HTML page.*prepare\.formats=\{"error\.jsonl"="html"\}'),
        ("denied.jsonl", b"<Error><Code>AccessDenied</Code></Error>", "markup, perhaps the answer of a server"),
        ("annexed.jsonl", b"/annex/objects/SHA256E-s1--0.jsonl", "git annex get"),
        ("tracked.jsonl.dvc", b"outs:\n- md5: 0\n", "dvc pull"),
        ("lost.jsonl.gz", bytes(4000), "NUL bytes alone"),
        ("lists.parquet", parquet(text=[["a"]]), "column `text` is list"),
        ("only-a-header.csv", b"id,text\n", "it holds no record"),
        ("feed.xml", b'<?xml version="1.0"?><a/>', "XML"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8.*iconv"),
        ("picture.png", b"\x89PNG\r\n\x1a\n\0", "a picture"),
        ("unknown.bin", bytes(range(256)), "binary"),
        ("tree.jsonl.gz", gzip.compress(bytes(257) + b"ustar" + bytes(300)), "a tar archive"),
        ("archive.jsonl", b"PK\x03\x04", "a ZIP archive"),
        ("arrow.parquet", b"ARROW1\0\0", "an Arrow file"),
        (
            "content.jsonl",
            b'{"content": "longest", "url": "u"}\n',
            "there is content, url.*prepare.fields.text=content",
        ),
        ("content.csv", b"id,body\n1,x\n", "there is id, body.*prepare.fields.text=body"),
        ("content.parquet", parquet(story=["x"], n=[1]), r"there is story \(string\), n \(int64\)"),
        ("number.parquet", parquet(text=[1]), "column `text` is int64"),
        ("within.json", b'{"version": 1, "data": [{"text": "x"}]}', "there is version, data"),
        ("strings.json", b'["a", "b"]', "a string, not an object"),
        ("prose.jsonl", b"Once upon\na time\n", r'not JSON.*prepare\.formats=\{"prose\.jsonl"="text"\}'),
        ("packed.parquet.gz", gzip.compress(parquet(text=["x"])), "Parquet in gzip"),
        ("deep.jsonl", gzip.compress(gzip.compress(gzip.compress(gzip.compress(RAW)))), "more than 3 times"),
    ],
)
def test_what_is_not_read_is_named_beside_what_is_and_can_be_left_out(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    (tmp_path / "good.jsonl").write_bytes(RAW)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"(?s)1 file of .* cannot be read.*{what}") as caught:
        read(tmp_path)
    assert name in caught.value.message
    assert f'prepare.files=["*", "!{name}"]' in str(caught.value.hint)
    assert len(read(tmp_path, files=("*", f"!{name}"))) == 5


def test_a_recipe_says_what_the_content_does_not(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_bytes(PAGE)
    (tmp_path / "raw.json").write_bytes(b'{"a": 1}')
    page, raw = read(tmp_path, formats={"*.html": "html", "raw.json": "text"})
    assert (page.text, raw.text) == ("the text of a page", '{"a": 1}')


def test_patterns_choose_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.txt", "old/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'{"text": "%s"}\n' % name.encode())
    assert [d.text for d in read(tmp_path, files=("*.jsonl", "!old/"))] == ["a.jsonl"]
    with pytest.raises(IntegrityError, match=r"chooses none of its 3 files"):
        read(tmp_path, files=("*.parquet",))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_web_archives_give_texts_and_the_text_of_pages(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    picture, missing = response(b"\x89PNG", b"image/png"), response(PAGE, status=b"404 Not Found")
    (tmp_path / "crawl.warc").write_bytes(b"".join(map(pack, (WET, response(PAGE), picture, missing))))
    plain, page = read(tmp_path)
    assert (plain.id, plain.text, json.loads(plain.metadata)) == (
        "<urn:uuid:1>",
        "plain text",
        {"url": "http://a.org/"},
    )
    assert (page.text, page.source) == ("the text of a page", "web")


def test_a_web_archive_that_is_cut_keeps_what_came_before(tmp_path: Path) -> None:
    (tmp_path / "crawl.warc.gz").write_bytes(gzip.compress(WET) + gzip.compress(response(PAGE * 40))[:-20])
    plain, bad = reader.read(tmp_path)
    assert isinstance(plain, Document)
    assert isinstance(bad, Quarantined)
    assert bad.reason == f"{DAMAGED_SHARD}: it ends in the middle"


def test_a_table_keeps_its_columns_and_its_empty_cells_are_empty_texts(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(
        parquet(content=["one", None], doc=[{"id": 7, "more": True}, {"id": 8, "more": None}])
    )
    one, two = read(tmp_path, fields={"text": "content", "id": "doc.id"})
    assert (one.id, one.text, json.loads(one.metadata)) == ("7", "one", {"doc": {"more": True}})
    assert (two.id, two.text) == ("8", "")
    (nested,) = {d.metadata for d in read(tmp_path, fields={"text": "content", "metadata": ()})}
    assert nested == ""


def test_rows_of_a_table_that_do_not_fit_their_header_are_quarantined(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'id,text\n1,"two\nlines, one cell"\n2,x,y\n4,good\n')
    records = list(reader.read(tmp_path))
    assert [r.text for r in records if isinstance(r, Document)] == ["two\nlines, one cell", "good"]
    reasons = [r.reason for r in records if isinstance(r, Quarantined)]
    assert reasons == ["a row of 3 cells under a header of 2"]


def test_a_quote_that_is_never_closed_does_not_swallow_the_rest_in_silence(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'id,text\n1,good\n2,"never closed\n' + b"3,lost\n" * 9)
    good, bad = reader.read(tmp_path)
    assert isinstance(good, Document)
    assert isinstance(bad, Quarantined)
    assert bad.reason == f"{DAMAGED_SHARD}: a quote is never closed"


def test_a_broken_array_keeps_what_comes_before_and_says_where_it_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"text": "x"}, {"text": }, {"text": "y"}]')
    good, bad = reader.read(tmp_path)
    assert isinstance(good, Document)
    assert isinstance(bad, Quarantined)
    assert (bad.line, bad.offset) == (2, 16)
    assert bad.reason.startswith(DAMAGED_SHARD)


def test_an_element_that_is_too_long_and_an_encoding_that_breaks_are_damage(tmp_path: Path) -> None:
    long, cut = tmp_path / "long", tmp_path / "cut"
    for folder, content in ((long, json.dumps([{"text": "x"}, {"text": "y" * 200_000}])), (cut, LINES * 4000)):
        folder.mkdir()
        (folder / "a.json").write_bytes(content.encode("utf-8" if folder == long else "utf-16")[:400_001])
    *_, bad = reader.read(long, PrepareConfig(max_line_bytes=1024))
    assert isinstance(bad, Quarantined)
    assert bad.reason == f"{DAMAGED_SHARD}: element 2: line of more than 1024 bytes"
    assert bad.do.startswith("prepare.max_line_bytes=4096")
    *_, bad = reader.read(cut)
    assert isinstance(bad, Quarantined)
    assert bad.reason.startswith(f"{DAMAGED_SHARD}: not UTF-16 to its end")


def test_an_array_is_read_through_a_window(tmp_path: Path) -> None:
    """Elements that are cut anywhere by the pieces the file is read in."""
    rows = [{"text": "\u00e9" * (n % 97) + str(n)} for n in range(4000)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [d.text for d in read(tmp_path)] == [row["text"] for row in rows]


@pytest.mark.parametrize("files", [2, 30])
def test_a_long_text_is_cut_between_paragraphs(files: int, tmp_path: Path) -> None:
    """With many files its parts stay together; with few they must be works of their own, or no split exists."""
    paragraph = "A paragraph of some words that stands for many others like it."
    text = "\n\n".join(f"{paragraph} {number}" for number in range(900))
    for number in range(files):
        (tmp_path / f"{number:02}.txt").write_text(text if number == 0 else paragraph)
    parts = [document for document in read(tmp_path) if document.id.startswith("00.txt")]
    assert "\n\n".join(part.text for part in parts) == text
    assert max(len(part.text) for part in parts) <= 20_000 + len(paragraph) + 5 < len(text)
    assert len({part.work for part in parts}) == (1 if files == 30 else len(parts))


def test_a_damaged_table_is_quarantined_where_it_breaks(tmp_path: Path) -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": [f"{'word ' * 9}{n}" for n in range(5000)]}), out, row_group_size=1000)
    whole = bytearray(out.getvalue())
    middle = len(whole) // 2
    whole[middle : middle + 4000] = bytes(4000)
    (tmp_path / "t.parquet").write_bytes(bytes(whole))
    *good, bad = reader.read(tmp_path)
    assert 1000 <= len(good) < 5000
    assert isinstance(bad, Quarantined)
    assert bad.reason.startswith(f"{DAMAGED_SHARD}: after row {len(good)}")
