"""The tokenizer: exact round trip for any text, no special token from a text, the same from the same texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipelines.core.errors import ConfigError
from pipelines.core.program import ROOT as CHECKOUT
from pipelines.data import document_files, tokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog " * 5,
    "numbers 12345 and 67890 " * 5,
    "naïve café — déjà vu " * 5,
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return tokenizer.train(TEXTS, 320)


@given(st.text())
def test_any_text_is_encoded_and_decoded_to_itself(trained: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode(trained, [text])
    assert trained.decode(ids, skip_special_tokens=False) == text
    assert all(token >= len(tokenizer.SPECIAL_TOKENS) for token in ids)


@pytest.mark.parametrize("special", tokenizer.SPECIAL_TOKENS)
def test_a_special_token_spelled_out_in_a_text_is_text(trained: Tokenizer, special: str) -> None:
    (ids,) = tokenizer.encode(trained, [f"before{special}after"])
    assert not set(ids) & set(range(len(tokenizer.SPECIAL_TOKENS)))
    assert trained.decode(ids) == f"before{special}after"


def test_special_tokens_come_first_and_every_byte_has_a_token(trained: Tokenizer) -> None:
    assert [trained.id_to_token(n) for n in range(4)] == list(tokenizer.SPECIAL_TOKENS)
    assert trained.get_vocab_size() <= 320
    for byte in range(0x80):
        assert len(tokenizer.encode(trained, [chr(byte)])[0]) == 1


def test_digits_are_never_merged() -> None:
    trained = tokenizer.train(["1984 1984 1984 1984 2024 2024"] * 50, 300)
    assert [trained.decode([token]).strip() for token in tokenizer.encode(trained, ["1984"])[0]] == ["1", "9", "8", "4"]


def test_a_word_that_occurs_only_in_test_gets_no_token_of_its_own(bundled: Path) -> None:
    """A held-out play has characters that no other work names: their names are spelled in pieces."""
    saved = Tokenizer.from_file(str(bundled / "tokenizer" / "tokenizer.json"))
    train = " ".join(document.text for document in document_files.documents(bundled / "documents" / "train.jsonl.zst"))
    test = " ".join(document.text for document in document_files.documents(bundled / "documents" / "test.jsonl.zst"))
    merged = [saved.decode([token]) for token in range(4 + 256, saved.get_vocab_size())]
    assert [piece for piece in merged if piece not in train] == []
    known = set(train.split())
    canaries = [word for word, times in Counter(test.split()).items() if times >= 30 and word not in known]
    assert canaries, "the test split has no frequent word of its own"
    assert not set(canaries) & {piece.strip() for piece in merged}


def test_the_saved_folder_loads_through_transformers_and_agrees(bundled: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(bundled / "tokenizer")
    index = json.loads((bundled / "index.json").read_text(encoding="utf-8"))
    names = (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.mask_token_id)
    assert names == (index["bos_id"], index["eos_id"], index["pad_id"], index["mask_id"]) == (0, 1, 2, 3)
    assert len(loaded) == index["vocab_size"] == 4096
    assert loaded.model_max_length == index["sequence_length"]
    text = "To be, or not to be: that is the question. 3:16"
    assert loaded.decode(loaded(text)["input_ids"]) == text
    saved = Tokenizer.from_file(str(bundled / "tokenizer" / "tokenizer.json"))
    assert loaded(text)["input_ids"] == tokenizer.encode(saved, [text])[0]


def test_training_is_the_same_with_any_number_of_threads_and_in_any_process(tmp_path: Path) -> None:
    script = (
        "import sys; from pipelines.data import tokenizer, document_files; from pathlib import Path;"
        "texts = [Path(p).read_text() for p in sorted(Path('pipelines').rglob('*.py'))];"
        "tokenizer.train(texts, 800).save(sys.argv[1])"
    )
    for threads in ("1", "2", "7"):
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / threads)],
            cwd=CHECKOUT,
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            check=True,
            timeout=60,
        )
    first, *others = ((tmp_path / threads).read_bytes() for threads in ("1", "2", "7"))
    assert all(other == first for other in others)


def test_a_saved_tokenizer_is_loaded_and_one_with_other_special_tokens_refused(
    trained: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(trained, tmp_path / "ours", 64)
    assert tokenizer.load(tmp_path / "ours").get_vocab() == trained.get_vocab()
    (tmp_path / "theirs").mkdir()
    foreign = json.loads((tmp_path / "ours" / "tokenizer.json").read_text().replace("<|mask|>", "[MASK]"))
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(foreign))
    with pytest.raises(ConfigError, match=r"the ids \[0, 1, 2, None\], 0 to 3 are needed"):
        tokenizer.load(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        tokenizer.load(tmp_path)
