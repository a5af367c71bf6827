"""The prepare stage as a whole: corrupt input, planted copies, worker counts, and what the artifact promises."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipelines.core.errors import IntegrityError
from pipelines.core.stage import Progress, StageContext
from pipelines.data import document_files, stage
from pipelines.data.config import PrepareConfig
from pipelines.data.shards import ShardReader
from pipelines.data.split import SPLITS
from pipelines.data.versioning import Corpus, hash_files
from pipelines.stages import STAGES

Records = list[dict[str, Any]]
OBSERVATIONS = set(STAGES["prepare"].observations)

BAD_LINES = (
    b'{"text": "caf\xe9"}',
    b'{"text": "cut',
    b'{"text": "a\x00b"}',
    b'{"text": 5}',
    b'{"id": "no text"}',
    b'{"text": ' + b"[" * 5000,
    b'{"text": "' + b"x" * 2000 + b'"}',
)


def results(folder: Path) -> dict[str, str]:
    """sha256 of every result file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {name: digest for name, digest in digests.items() if name not in OBSERVATIONS}


def kept(folder: Path) -> dict[str, list[document_files.Document]]:
    return {split: list(document_files.documents(folder / "documents" / f"{split}.jsonl.zst")) for split in SPLITS}


def test_a_corrupt_corpus_gives_the_bytes_of_the_clean_one_and_lists_every_bad_record(
    tmp_path: Path,
    make_documents: Callable[..., Records],
    write_shard: Callable[..., Path],
    prepare: Callable[..., Path],
) -> None:
    records = make_documents(120, words=60)
    clean = write_shard(tmp_path / "clean" / "a.jsonl", records).parent
    lines = [json.dumps(record).encode() for record in records]
    for number, bad in enumerate(BAD_LINES):
        lines.insert(10 * number + 3, bad)
    dirty = tmp_path / "dirty"
    dirty.mkdir()
    with gzip.open(dirty / "a.jsonl.gz", "wb") as file:
        file.write(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    first = prepare(clean, max_line_bytes=1024)
    second = prepare(dirty, max_line_bytes=1024, max_bad_fraction=0.1)
    assert results(first) == results(second)
    quarantined = [json.loads(line) for line in (second / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [bad["line"] for bad in quarantined] == [10 * n + 4 for n in range(len(BAD_LINES))]
    raw = gzip.decompress((dirty / "a.jsonl.gz").read_bytes())
    for bad, line in zip(quarantined, BAD_LINES, strict=True):
        assert raw[bad["offset"] :].startswith(line)
    assert json.loads((second / "report.json").read_text(encoding="utf-8"))["quarantined"] == len(BAD_LINES)


def test_too_many_malformed_records_stop_the_stage_with_the_first_five(
    tmp_path: Path,
    make_documents: Callable[..., Records],
    write_shard: Callable[..., Path],
    prepare: Callable[..., Path],
) -> None:
    shard = write_shard(tmp_path / "c" / "a.jsonl", make_documents(100, words=60))
    shard.write_bytes(shard.read_bytes() + b"\n".join(BAD_LINES) + b"\n")
    with pytest.raises(IntegrityError, match=r"7 of 107 records are malformed \(6\.54%\)") as caught:
        prepare(shard.parent, max_bad_fraction=0.05, max_line_bytes=1024)
    assert caught.value.exit_code == 3
    assert caught.value.message.count("a.jsonl, line 10") == 5
    listed = Path(str(caught.value.hint).split()[-1]).read_text(encoding="utf-8")
    assert len(listed.splitlines()) == 7


def test_a_damaged_shard_stops_the_stage_however_many_records_may_be_bad(
    tmp_path: Path, make_documents: Callable[..., Records], prepare: Callable[..., Path]
) -> None:
    raw = "".join(json.dumps(record) + "\n" for record in make_documents(100)).encode()
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(raw)[:-2000])
    with pytest.raises(IntegrityError, match="damaged shard"):
        prepare(folder, max_bad_fraction=0.9)
    prepare(folder, max_bad_fraction=1.0)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": "too short"}\n'])
def test_a_corpus_without_documents_stops_the_stage(tmp_path: Path, content: str, prepare: Callable[..., Path]) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"a\.jsonl: (empty|blank)|no document is left"):
        prepare(tmp_path / "c")


def test_a_split_smaller_than_one_sequence_stops_the_stage(
    tmp_path: Path,
    make_documents: Callable[..., Records],
    write_shard: Callable[..., Path],
    prepare: Callable[..., Path],
) -> None:
    folder = write_shard(tmp_path / "c" / "a.jsonl", make_documents(30)).parent
    with pytest.raises(IntegrityError, match="less than one sequence of 4096"):
        prepare(folder, sequence_length=4096)


@pytest.mark.parametrize("documents", [3, 12])
def test_held_out_text_that_nothing_can_be_measured_on_stops_the_stage(
    documents: int,
    tmp_path: Path,
    make_documents: Callable[..., Records],
    write_shard: Callable[..., Path],
    prepare: Callable[..., Path],
) -> None:
    folder = write_shard(tmp_path / "c" / "a.jsonl", make_documents(documents)).parent
    with pytest.raises(
        IntegrityError, match=r"split has 1 document, prepare\.min_held_out_documents asks for 2"
    ) as caught:
        prepare(folder, min_held_out_documents=2)
    assert "_fraction, add documents" in str(caught.value.hint)


def test_equal_ids_are_counted_and_a_long_line_names_its_setting(
    tmp_path: Path,
    make_documents: Callable[..., Records],
    write_shard: Callable[..., Path],
    prepare: Callable[..., Path],
) -> None:
    records = list(make_documents(60))
    records[5]["id"] = records[6]["id"] = records[7]["id"]
    folder = write_shard(tmp_path / "c" / "a.jsonl", records).parent
    assert json.loads((prepare(folder) / "report.json").read_text())["duplicate_ids"] == 2
    write_shard(folder / "b.jsonl", [*make_documents(3, seed=1), {"text": "x" * 5000}])
    with pytest.raises(IntegrityError, match="line of more than 2048 bytes") as caught:
        prepare(folder, max_line_bytes=2048)
    assert "prepare.max_line_bytes=8192" in str(caught.value.hint)


def test_planted_copies_are_dropped_and_counted_and_unique_documents_stay(
    tmp_path: Path,
    make_documents: Callable[..., Records],
    write_shard: Callable[..., Path],
    prepare: Callable[..., Path],
) -> None:
    unique = make_documents(200, words=150)
    poison = dict(unique[7])
    exact = [poison | {"id": f"exact-{n}"} for n in range(10)]
    disguised = [poison | {"id": f"disguised-{n}", "text": "\u200b".join(poison["text"].upper())} for n in range(3)]
    words = poison["text"].split()
    edited = [poison | {"id": f"edited-{n}", "text": " ".join([*words[:n], "CHANGED", *words[n:]])} for n in (20, 70)]
    out = prepare(write_shard(tmp_path / "c" / "a.jsonl", unique + exact + disguised + edited).parent)
    ids = sorted(document.id for documents in kept(out).values() for document in documents)
    # The longest of the near-duplicates stays, the earlier one of the two that are.
    assert ids == sorted("edited-20" if record["id"] == poison["id"] else record["id"] for record in unique)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    pairs = report["duplicates"].pop("pairs")
    assert [(pair["dropped"]["id"], pair["kept"]["id"]) for pair in pairs] == [
        ("edited-70", "edited-20"),
        (poison["id"], "edited-20"),
    ]
    assert report["duplicates"] == {"exact": 13, "near": 2, "near_clusters": 1, "largest_near_cluster": 3}
    assert report["sources"][poison["source"]]["dropped"] == {"exact duplicate": 13, "near duplicate": 2}


def test_works_that_share_a_copy_land_on_one_side(
    tmp_path: Path,
    make_documents: Callable[..., Records],
    write_shard: Callable[..., Path],
    prepare: Callable[..., Path],
) -> None:
    records = [record | {"work": f"work-{number // 4}"} for number, record in enumerate(make_documents(160))]
    for chain in range(0, 36, 4):
        records[4 * chain + 5] |= {"text": records[4 * chain]["text"]}
    out = prepare(write_shard(tmp_path / "c" / "a.jsonl", records).parent, test_fraction=0.3, validation_fraction=0.3)
    side = {document.work: split for split, documents in kept(out).items() for document in documents}
    for chain in range(0, 36, 4):
        assert side[f"work-{chain}"] == side[f"work-{chain + 1}"]
    assert set(side.values()) == set(SPLITS)


def test_the_number_of_workers_changes_no_byte(
    tmp_path: Path,
    make_documents: Callable[..., Records],
    write_shard: Callable[..., Path],
    prepare: Callable[..., Path],
) -> None:
    folder = write_shard(tmp_path / "c" / "a.jsonl", make_documents(900, words=400)).parent
    alone, together = prepare(folder, workers=1), prepare(folder, workers=2)
    assert results(alone) == results(together)
    assert (alone / "report.json").read_bytes() == (together / "report.json").read_bytes()


def test_a_second_attempt_in_the_same_scratch_is_not_mixed_with_the_first(
    tmp_path: Path,
    make_documents: Callable[..., Records],
    write_shard: Callable[..., Path],
    prepare: Callable[..., Path],
) -> None:
    folder = write_shard(tmp_path / "c" / "a.jsonl", make_documents(60)).parent
    reference = prepare(folder)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for name in ("cleaned.jsonl.zst", "signatures.u32", "quarantine.jsonl"):
        (scratch / name).write_bytes(b"left over from a killed attempt" * 100)
    out = tmp_path / "again"
    out.mkdir()
    config = PrepareConfig(vocab_size=300, sequence_length=16, workers=1, min_held_out_documents=1)
    stage.prepare(Corpus(folder, "hash", hash_files(folder)), config, out, StageContext("prepare", scratch))
    assert results(out) == results(reference)
    assert (out / "quarantine.jsonl").read_bytes() == b""


def test_a_corpus_that_changes_after_its_verification_is_refused(
    tmp_path: Path, make_documents: Callable[..., Records], write_shard: Callable[..., Path]
) -> None:
    shard = write_shard(tmp_path / "c" / "a.jsonl", make_documents(60))
    verified = Corpus(shard.parent, "hash", hash_files(shard.parent))
    shard.write_bytes(shard.read_bytes().replace(b"d0-5", b"d0-6", 1))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(IntegrityError, match=r"a\.jsonl changed while it was read: expected md5 \w{32}, found \w{32}"):
        stage.prepare(verified, PrepareConfig(), out, StageContext("prepare", tmp_path / "scratch"))
    assert list(out.iterdir()) == []


def test_progress_is_reported_from_the_first_step_to_the_last(
    tmp_path: Path, make_documents: Callable[..., Records], write_shard: Callable[..., Path]
) -> None:
    folder = write_shard(tmp_path / "c" / "a.jsonl", make_documents(60)).parent
    reports: list[Progress] = []
    out = tmp_path / "out"
    out.mkdir()
    context = StageContext("prepare", tmp_path / "scratch", report=reports.append)
    config = PrepareConfig(vocab_size=300, sequence_length=16, min_held_out_documents=1)
    stage.prepare(Corpus(folder, "hash", hash_files(folder)), config, out, context)
    assert [report.done for report in reports] == [1, 2, 3, 4, 5, 6]
    assert {report.total for report in reports} == {6}


def test_the_index_agrees_with_the_shards_the_documents_and_the_tokenizer(bundled: Path) -> None:
    index = json.loads((bundled / "index.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(bundled / "tokenizer" / "tokenizer.json"))
    assert index["vocab_size"] == tokenizer.get_vocab_size()
    for split, documents in kept(bundled).items():
        facts = index["splits"][split]
        reader = ShardReader(bundled, split)
        assert facts["sequences"] == len(reader)
        assert facts["tokens"] + facts["padding"] == len(reader) * index["sequence_length"]
        assert facts["padding"] == np.count_nonzero(reader.take(np.arange(len(reader))) == index["pad_id"])
        assert facts["padding"] < 0.02 * facts["tokens"]
        assert facts["documents"] == len(documents)
        assert facts["bytes"] == sum(len(document.text.encode()) for document in documents)
        assert facts["dropped_tokens"] == 0


def test_decoding_the_packed_test_split_by_its_map_gives_its_documents_back(bundled: Path) -> None:
    index = json.loads((bundled / "index.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(bundled / "tokenizer" / "tokenizer.json"))
    reader = ShardReader(bundled, "test")
    pieces: dict[tuple[int, int], list[int]] = {}
    for number in range(len(reader)):
        row, parts = reader[number], reader.parts(number)
        ends = [*parts[1:, 0], index["sequence_length"]]
        for (column, document, offset), end in zip(parts.tolist(), ends, strict=True):
            pieces[document, offset] = [token for token in row[column:end].tolist() if token != index["pad_id"]]
    decoded: dict[int, list[int]] = {}
    for (document, _), tokens in sorted(pieces.items()):
        decoded.setdefault(document, []).extend(tokens)
    texts = [document.text for document in kept(bundled)["test"]]
    assert [tokenizer.decode(decoded[number][1:-1]) for number in range(len(texts))] == texts
    assert {(tokens[0], tokens[-1]) for tokens in decoded.values()} == {(index["bos_id"], index["eos_id"])}


@pytest.mark.parametrize("packing", ["best_fit", "concatenated"])
def test_packed_by_source_every_sequence_is_of_one_source_and_the_map_names_its_documents(
    packing: str,
    tmp_path: Path,
    make_documents: Callable[..., Records],
    write_shard: Callable[..., Path],
    prepare: Callable[..., Path],
) -> None:
    folder = write_shard(tmp_path / "c" / "a.jsonl", make_documents(90, words=40)).parent
    out = prepare(folder, pack_by="source", packing=packing, sequence_length=64)
    index = json.loads((out / "index.json").read_text(encoding="utf-8"))
    tokenizer, documents = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json")), kept(out)["train"]
    reader, facts = ShardReader(out, "train"), index["splits"]["train"]
    assert [each["source"] for each in facts["sources"]] == ["source-0", "source-1", "source-2"]
    assert sum(each["sequences"] for each in facts["sources"]) == facts["sequences"] == len(reader)
    assert facts["tokens"] + facts["padding"] == facts["sequences"] * 64
    assert sum(each["tokens"] for each in facts["sources"]) == facts["tokens"] + facts["dropped_tokens"]
    owners = [each["source"] for each in facts["sources"] for _ in range(each["sequences"])]
    for number, owner in enumerate(owners):
        row, parts = reader[number], reader.parts(number).tolist()
        for column, document, offset in parts:
            assert documents[document].source == owner
            ids = [index["bos_id"], *tokenizer.encode(documents[document].text, add_special_tokens=False).ids]
            assert row[column] == [*ids, index["eos_id"]][offset]
    plain = prepare(folder, packing=packing, sequence_length=64)
    assert "sources" not in json.loads((plain / "index.json").read_text())["splits"]["train"]
    assert "sources" not in index["splits"]["validation"]


def test_another_corpus_is_packed_with_the_tokenizer_of_a_model(
    tmp_path: Path,
    make_documents: Callable[..., Records],
    write_shard: Callable[..., Path],
    prepare: Callable[..., Path],
) -> None:
    records = make_documents(120, words=60)
    upper = [{**record, "text": record["text"].upper()} for record in records]
    first = prepare(write_shard(tmp_path / "one" / "a.jsonl", records).parent)
    other = write_shard(tmp_path / "two" / "a.jsonl", upper).parent
    tuned, own = prepare(other, first / "tokenizer", vocab_size=260), prepare(other)
    assert (tuned / "tokenizer/tokenizer.json").read_bytes() == (first / "tokenizer/tokenizer.json").read_bytes()
    assert (own / "tokenizer/tokenizer.json").read_bytes() != (first / "tokenizer/tokenizer.json").read_bytes()
    words = Tokenizer.from_file(str(first / "tokenizer/tokenizer.json"))
    index = json.loads((tuned / "index.json").read_text())
    assert index["vocab_size"] == words.get_vocab_size() == json.loads((first / "index.json").read_text())["vocab_size"]
    shown = words.decode(ShardReader(tuned, "train").take(np.arange(3)).ravel().tolist())
    document = kept(tuned)["train"][0].text
    assert shown[:20] == document[:20]
