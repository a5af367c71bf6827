"""What a run would do with a corpus is said from a thousand records, and agrees with what prepare does."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.data import check, reader
from pipelines.data.config import PrepareConfig
from tests.bench.planted_corpus import Maker

Records = Sequence[dict[str, Any]]


def look(folder: Path, **settings: Any) -> dict[str, Any]:
    return check.check(folder, reader.relative_names(folder), PrepareConfig(**settings), gate_documents=20)


def test_a_small_corpus_is_told_exactly(
    tmp_path: Path, make_documents: Callable[..., Records], write_shard: Callable[..., Path]
) -> None:
    records = list(make_documents(80))
    write_shard(tmp_path / "a.jsonl", [{**record, "score": 1} for record in records[:50]])
    write_shard(tmp_path / "b.jsonl", [*records[50:], {"id": records[0]["id"], "text": "short"}])
    found = look(tmp_path, test_fraction=0.1)
    assert (found["formats"], found["files"], found["documents"], found["documents_exact"]) == (
        {"jsonl": 2},
        2,
        81,
        True,
    )
    assert found["text_bytes"] == sum(len(record["text"].encode()) for record in records) + len("short")
    assert (found["kept"], found["dropped"], found["duplicate_ids"]) == (80, {"too short": 1}, [records[0]["id"]])
    assert (found["fields"], found["held_out"]["test"], found["refused"]) == (["score"], 8, [])
    assert found["scripts"]["LATIN"] > 0.9
    assert sum(found["languages"].values()) == pytest.approx(1, abs=0.01)
    assert "about 8 documents will judge the models, the gate wants 20" in found["said"][0]


@pytest.mark.parametrize("pack", [lambda raw: raw, gzip.compress])
def test_a_large_one_is_estimated_from_a_thousand_records(
    tmp_path: Path, make_documents: Callable[..., Records], pack: Callable[[bytes], bytes]
) -> None:
    raw = "".join(json.dumps(record) + "\n" for record in make_documents(5000, words=60)).encode()
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(pack(raw))
    found = look(tmp_path)
    assert (found["records_read"], found["documents_exact"]) == (1000, False)
    assert found["documents"] == pytest.approx(10_000, rel=0.1)


@pytest.mark.parametrize(
    ("content", "what", "do"),
    [
        (b'{"story": "once", "url": "u"}\n', "there is story, url", "prepare.fields.text=story"),
        (b'{"text": "' + b"x" * 2000 + b'"}\n{"text": "y"}\n', "line of more than 1024", "prepare.max_line_bytes=4096"),
        (b'{"text": "y"}\n{"text": 5}\n', "50.00% of the records", "prepare.max_bad_fraction"),
        (b'{"text": "y"}\n', "0 documents are left", "prepare.min_characters"),
        (b"", "empty", "prepare.files="),
    ],
)
def test_what_would_be_refused_is_told_with_the_setting_that_mends_it(
    tmp_path: Path, content: bytes, what: str, do: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    refused = look(tmp_path, max_line_bytes=1024)["refused"]
    assert any(what in one["what"] and do in one["do"] for one in refused), refused


def test_languages_are_told_by_share(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    said = [("en", 6), ("de", 3), ("th", 1)]
    texts = [Maker(n).text(code, Maker(n).sentences(code, 12)) for code, count in said for n in range(count)]
    write_shard(tmp_path / "a.jsonl", [{"id": str(n), "text": text} for n, text in enumerate(texts)])
    assert look(tmp_path)["languages"] == {"en": 0.6, "de": 0.3, "th": 0.1}
