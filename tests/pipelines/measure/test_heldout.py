"""The held-out documents: read as prepared, chosen fairly, refused when damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from pipelines.core.artifact import Artifact
from pipelines.core.errors import IntegrityError
from pipelines.core.program import ROOT
from pipelines.data import tokenizer as tokenization
from pipelines.data.config import TokenizerTraining
from pipelines.measure import heldout
from pipelines.measure.heldout import Document


def _write(folder: Path, lines: list[str]) -> Path:
    (folder / "documents").mkdir(parents=True, exist_ok=True)
    path = folder / "documents" / "test.jsonl.zst"
    path.write_bytes(zstandard.compress("".join(line + "\n" for line in lines).encode()))
    return path


def test_tokens_are_the_text_between_start_and_end(prepared: Artifact) -> None:
    held = heldout.load(prepared.path)
    tokenizer = Tokenizer.from_file(str(prepared.path / "tokenizer" / "tokenizer.json"))
    assert not held.truncated
    assert held.total == len(held.documents) == len(held.tokens)
    for document, ids in zip(held.documents, held.tokens, strict=True):
        assert (ids[0], ids[-1]) == (0, 1)
        assert tokenizer.decode(ids[1:-1].tolist()) == document.text
    assert held.sizes.tolist() == [len(document.text.encode()) for document in held.documents]


def test_a_limit_keeps_the_order_is_stable_and_is_marked(prepared: Artifact) -> None:
    everything, some, fewer = (heldout.load(prepared.path, limit) for limit in (None, 5, 3))
    assert some.truncated
    assert (len(some.documents), some.total) == (5, everything.total)
    assert [d for d in everything.documents if d in some.documents] == list(some.documents)
    assert set(fewer.documents) < set(some.documents)
    assert heldout.load(prepared.path, 10_000).truncated is False


def test_the_choice_of_documents_favours_no_source() -> None:
    """Documents come sorted by source; the first ones would all be of one."""
    documents = [Document(f"{source}-{i}", "text", source) for source in "ab" for i in range(200)]
    chosen = heldout.choose(documents, 100)
    share = sum(document.source == "a" for document in chosen) / 100
    assert 0.35 < share < 0.65


def test_token_sizes_add_up_to_the_bytes_of_any_text(prepared: Artifact) -> None:
    path = prepared.path / "tokenizer" / "tokenizer.json"
    sizes = heldout.token_sizes(path)
    for text in ("plain words", "naïve Übermut\n\ttabs", "日本語 and 🎭", "\x00\x7f"):
        ids = Tokenizer.from_file(str(path)).encode(text).ids
        assert sizes[ids].sum() == len(text.encode())
    assert sizes[:4].tolist() == [0, 0, 0, 0]


def test_train_rows_read_whole_shards_in_order_up_to_the_limit(prepared: Artifact) -> None:
    index = json.loads((prepared.path / "index.json").read_text())
    files = sorted((prepared.path / "train").iterdir())
    everything = np.concatenate([np.load(path) for path in files])
    np.testing.assert_array_equal(heldout.train_rows(prepared.path, index, 10**9), everything)
    count = len(np.load(files[0])) + 3
    np.testing.assert_array_equal(heldout.train_rows(prepared.path, index, 64 * count + 5), everything[:count])


def test_too_few_documents_for_an_interval_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, [json.dumps({"id": "1", "text": "alone"})])
    with pytest.raises(IntegrityError, match=r"test\.jsonl\.zst has 1 documents: a confidence interval"):
        heldout.load(tmp_path)


@pytest.mark.parametrize("line", ["{not json", '{"id": "1"}', "[1, 2]"])
def test_a_damaged_record_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = _write(tmp_path, [json.dumps({"id": "1", "text": "fine"}), line])
    with pytest.raises(IntegrityError, match=r"test\.jsonl\.zst, line 2: not a document record"):
        list(heldout.read_documents(path))


def test_a_missing_or_broken_file_is_an_integrity_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="cannot read"):
        heldout.load(tmp_path)
    path = _write(tmp_path, [json.dumps({"id": str(i), "text": "x" * 50}) for i in range(9)])
    damaged = bytearray(path.read_bytes())
    damaged[0] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match="cannot read"):
        list(heldout.read_documents(path))


def test_a_model_with_another_tokenizer_is_refused_with_both_hashes(prepared: Artifact, tmp_path: Path) -> None:
    ours = prepared.path / "tokenizer" / "tokenizer.json"
    shutil.copy(ours, tmp_path)
    heldout.check_tokenizer(prepared.path, tmp_path)
    (tmp_path / "tokenizer.json").write_text(ours.read_text() + "\n")
    with pytest.raises(IntegrityError, match=r"sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        heldout.check_tokenizer(prepared.path, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(IntegrityError, match=r"\(missing\)"):
        heldout.check_tokenizer(prepared.path, tmp_path)


def test_a_special_token_spelled_in_a_document_is_measured_as_the_text_that_packing_sees(prepared: Artifact) -> None:
    path = prepared.path / "tokenizer" / heldout.TOKENIZER
    for special in tokenization.SPECIAL_TOKENS:
        document = heldout.Document("a", f"before{special}after", "s")
        (ids,) = heldout.tokenize((document,), path, {"bos_id": 0, "eos_id": 1})
        assert ids.tolist() == [0, *tokenization.encode(Tokenizer.from_file(str(path)), [document.text])[0], 1]
        assert not set(ids[1:-1].tolist()) & set(range(4))
        assert heldout.token_sizes(path)[ids].sum() == document.size, "bits per byte would be of other bytes"


def test_corpus_text_is_encoded_in_one_place() -> None:
    users = [path for path in (ROOT / "pipelines").rglob("*.py") if "encode_batch" in path.read_text(encoding="utf-8")]
    assert users == [ROOT / "pipelines" / "data" / "tokenizer.py"]


def _wordpiece(folder: Path) -> Path:
    """An uncased WordPiece tokenizer as BERT's, which says in its file to cut texts and to fill them up."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cafe", "run", "##ning", "##s", "a", "."]
    encoder = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    encoder.normalizer = normalizers.BertNormalizer(lowercase=True)
    encoder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    encoder.add_special_tokens(words[:5])
    encoder.enable_truncation(4)
    encoder.enable_padding(length=6)
    path = folder / heldout.TOKENIZER
    encoder.save(str(path))
    return path


def test_a_text_is_measured_whole_whatever_its_tokenizer_says_of_lengths(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2's tokenizer.json cuts every text at 128 tokens, and fills shorter ones up to that."""
    path = _wordpiece(tmp_path)
    long, short = (Document(name, text, "s") for name, text in (("l", "run " * 9), ("s", "a")))
    tokens = heldout.tokenize((long, short), path, {"bos_id": 2, "eos_id": 3})
    assert tokens[0].tolist() == [2, *[6] * 9, 3]
    assert tokens[1].tolist() == [2, 9, 3]


def test_pieces_stand_for_the_text_as_it_was_written_and_unknown_ones_for_none(tmp_path: Path) -> None:
    path = _wordpiece(tmp_path)
    document = Document("d", "Café  Running\n日本 a run.", "s")
    (ids,) = heldout.tokenize((document,), path, {"bos_id": 2, "eos_id": 3})
    assert ids.tolist() == [2, 5, 6, 7, 1, 1, 9, 6, 10, 3]
    (sizes,) = heldout.token_bytes(path, (document,), (ids,))
    # start, Café, run with two blanks, ##ning, 日, 本, a, run, the point, end
    assert sizes.tolist() == [0, 5, 5, 4, 0, 0, 2, 4, 1, 0]
    assert sizes.sum() == document.size - len("\n日本".encode())
    (beginning,) = heldout.token_bytes(path, (document,), (ids[:4],))
    assert beginning.tolist() == sizes[:4].tolist()
    assert heldout.unknown_id(path) == 1


@pytest.mark.parametrize("model", ["bpe", "unigram", "wordpiece"])
def test_bytes_of_trained_vocabularies_add_up(model: Literal["bpe", "unigram", "wordpiece"], tmp_path: Path) -> None:
    texts = ["unbelievable running water", "naïve 日本語 and unbelievers"]
    trained = tokenization.train(texts * 20, 400, TokenizerTraining(model=model))
    trained.tokenizer.save(str(path := tmp_path / heldout.TOKENIZER))
    documents = tuple(Document(str(n), text, "s") for n, text in enumerate(texts))
    tokens = heldout.tokenize(documents, path, {"bos_id": 0, "eos_id": 1})
    found = heldout.token_bytes(path, documents, tokens)
    assert [int(each.sum()) for each in found] == [document.size for document in documents]
    assert heldout.unknown_id(path) is None
