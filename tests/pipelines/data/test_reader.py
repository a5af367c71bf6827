"""Reading: what is accepted, what is quarantined and where it is said to be, and that memory stays bounded."""

from __future__ import annotations

import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.core.errors import IntegrityError
from pipelines.data import reader
from pipelines.data.config import PrepareConfig
from pipelines.data.formats.lines import cut
from pipelines.data.records import DAMAGED_SHARD, Document, Quarantined

GOOD = b'{"id": "a", "text": "first", "source": "s", "license": "l"}'
LAST = b'{"id": "z", "text": "last", "source": "s", "license": "l"}'


def read(path: Path, max_line_bytes: int = 1 << 20) -> list[Document | Quarantined]:
    return list(reader.read(path, PrepareConfig(max_line_bytes=max_line_bytes)))


def split(records: list[Document | Quarantined]) -> tuple[list[Document], list[Quarantined]]:
    return [r for r in records if isinstance(r, Document)], [r for r in records if isinstance(r, Quarantined)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "caf\xe9"}', "not UTF-8 at byte 13"),
        (b'{"id": "x", "text": "cut in the mid', "not JSON: Unterminated string"),
        (b'{"text": "a\x00b"}', "NUL byte"),
        (b"\x00" * 64, "NUL byte"),
        (b'{"text": 5}', "field `text` is a number"),
        (b'{"text": null}', "field `text` is a null"),
        (b'{"text": ["a"]}', "field `text` is a list"),
        (b'{"text": "t", "source": [3]}', "field `source` is a list"),
        (b'{"text": "t", "work": {}}', "field `work` is a object"),
        (b'{"text": "t", "id": true}', "field `id` is a boolean"),
        (b'{"id": "x"}', "no field `text`"),
        (b'["text"]', "a list, not an object"),
        (b'"text"', "a string, not an object"),
        (b"17", "a number, not an object"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "t", "n": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"text": "x"} {"text": "y"}', "not JSON: Extra data"),
    ],
)
def test_a_malformed_line_is_quarantined_with_its_place_and_its_neighbours_survive(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + line + b"\n" + LAST + b"\n")
    documents, bad = split(read(tmp_path))
    assert [d.id for d in documents] == ["a", "z"]
    assert [(b.shard, b.line, b.offset) for b in bad] == [("a.jsonl", 2, len(GOOD) + 1)]
    assert reason in bad[0].reason
    assert len(bad[0].reason) < 200


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_byte_order_mark_and_missing_last_newline_change_nothing(
    tmp_path: Path, end: bytes, mark: bytes, last: bool
) -> None:
    (tmp_path / "a.jsonl").write_bytes(mark + GOOD + end + end + LAST + (end if last else b""))
    assert [d.text for d in split(read(tmp_path))[0]] == ["first", "last"]
    assert split(read(tmp_path))[1] == []


def test_missing_optional_fields_get_names_that_say_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "t"}\n{"text": "u", "id": 7, "work": null}\n')
    first, second = split(read(tmp_path))[0]
    assert (first.id, first.source, first.license, first.work) == ("a.jsonl:1", "unknown", "unknown", "")
    assert (second.id, second.work) == ("7", "")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_every_compression_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    raw = b"".join(json.dumps({"id": str(n), "text": "x" * n}).encode() + b"\n" for n in range(500))
    (tmp_path / f"a{suffix}").write_bytes(compress(raw, suffix))
    assert [(d.id, len(d.text)) for d in split(read(tmp_path))[0]] == [(str(n), n) for n in range(500)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_several_frames_in_one_file_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(compress(GOOD + b"\n", suffix) + compress(LAST + b"\n", suffix))
    assert [d.id for d in split(read(tmp_path))[0]] == ["a", "z"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_shard_cut_short_is_reported_as_damaged(tmp_path: Path, suffix: str) -> None:
    raw = b"".join(
        json.dumps({"id": str(n), "text": hashlib.sha256(b"%d" % n).hexdigest()}).encode() + b"\n" for n in range(9000)
    )
    whole = compress(raw, suffix)
    (tmp_path / f"a{suffix}").write_bytes(whole[: len(whole) // 2])
    documents, bad = split(read(tmp_path))
    assert 0 < len(documents) < 9000
    assert bad[-1].reason.startswith(DAMAGED_SHARD)
    assert bad[-1].offset > 0


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_flipped_byte_in_a_compressed_shard_is_reported_as_damaged(tmp_path: Path, suffix: str) -> None:
    raw = b"".join(
        json.dumps({"id": str(n), "text": hashlib.sha256(b"%d" % n).hexdigest()}).encode() + b"\n" for n in range(300)
    )
    whole = bytearray(compress(raw, suffix))
    whole[len(whole) // 2] ^= 0x10
    (tmp_path / f"a{suffix}").write_bytes(bytes(whole))
    try:
        said = [b.reason for b in split(read(tmp_path))[1]]
    except IntegrityError as error:  # nothing of it could be read
        said = [error.message]
    assert any(DAMAGED_SHARD in reason for reason in said)


def test_a_line_that_is_too_long_is_skipped_without_being_held_in_memory(tmp_path: Path) -> None:
    long = 64 << 20
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(GOOD + b'\n{"text": "')
        for _ in range(long >> 20):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + LAST + b"\n")
    tracemalloc.start()
    documents, bad = split(read(tmp_path, max_line_bytes=1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [d.id for d in documents] == ["a", "z"]
    assert [(b.line, b.offset, b.reason) for b in bad] == [(2, len(GOOD) + 1, f"line of more than {1 << 20} bytes")]
    assert peak < 24 << 20


def test_shards_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'{"text": "t", "id": "%s"}\n' % name.encode())
    assert [d.id for d in split(read(tmp_path))[0]] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]


def test_a_shard_that_changed_since_it_was_verified_is_refused_with_both_hashes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n")
    right = hashlib.md5(GOOD + b"\n").hexdigest()
    assert len(list(reader.read(tmp_path, md5={"a.jsonl": right}))) == 1
    (tmp_path / "a.jsonl").write_bytes(LAST + b"\n")
    wrong = hashlib.md5(LAST + b"\n").hexdigest()
    with pytest.raises(
        IntegrityError, match=rf"a\.jsonl changed while it was read: expected md5 {right}, found {wrong}"
    ):
        list(reader.read(tmp_path, md5={"a.jsonl": right}))


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=30),
    chunk=st.integers(1, 50),
    limit=st.integers(1, 30),
)
def test_lines_equal_a_plain_split_however_the_stream_is_cut(lines: list[bytes], chunk: int, limit: int) -> None:
    raw = b"\n".join(lines)
    chunks = iter([raw[i : i + chunk] for i in range(0, len(raw), chunk)])
    expected, offset = [], 0
    for line in raw.split(b"\n"):
        expected.append((offset, line if len(line) <= limit else None))
        offset += len(line) + 1
    if raw == b"" or raw.endswith(b"\n"):
        expected.pop()
    assert list(cut(chunks, b"\n", limit)) == expected


def compress(raw: bytes, suffix: str) -> bytes:
    if suffix == ".jsonl.gz":
        return gzip.compress(raw)
    if suffix == ".jsonl.zst":
        return zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    return raw
