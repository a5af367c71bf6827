"""The tokenizer: exact round trip for any text, no special token from a text, the same from the same texts."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipelines.core.errors import ConfigError
from pipelines.core.program import ROOT as CHECKOUT
from pipelines.data import document_files, tokenizer, tokenizer_files
from pipelines.data.config import PrepareConfig, PrepareJob, TokenizerTraining

TEXTS = [
    "the quick brown fox jumps over the lazy dog " * 5,
    "numbers 12345 and 67890 " * 5,
    "naïve café — déjà vu " * 5,
]


KINDS = [
    {"pre_tokenizer": "gpt2", "single_digits": True},
    {"max_token_length": 5},
    {"model": "unigram"},
    {"model": "wordpiece", "pre_tokenizer": "gpt2"},
    {},
]


def train(texts: list[str], size: int = 320, **settings: Any) -> tokenizer.CorpusTokenizer:
    return tokenizer.train(texts, size, TokenizerTraining(**settings))


@pytest.fixture(scope="module", params=KINDS, ids=str)
def trained(request: pytest.FixtureRequest) -> Tokenizer:
    size = 620 if request.param.get("model") == "wordpiece" else 320
    return train(TEXTS, size, **request.param).tokenizer


@settings(deadline=None)
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
    assert 256 < trained.get_vocab_size() <= 620
    for byte in range(0x80):
        assert len(tokenizer.encode(trained, [chr(byte)])[0]) == 1


def pieces(trained: tokenizer.CorpusTokenizer, text: str) -> list[str]:
    return [trained.tokenizer.decode([token]).strip() for token in tokenizer.encode(trained.tokenizer, [text])[0]]


def test_single_digits_are_never_merged_and_others_to_threes() -> None:
    texts = ["19847 19847 19847 19847 20245 20245"] * 50
    assert pieces(train(texts, 300, single_digits=True), "19847") == ["1", "9", "8", "4", "7"]
    assert pieces(train(texts, 300), "19847") == ["198", "47"]


def test_a_token_is_no_longer_than_asked_for() -> None:
    longest = train(TEXTS, 500, max_token_length=4).tokenizer
    assert max(len(token) for token in longest.get_vocab() if token not in tokenizer.SPECIAL_TOKENS) in (3, 4)


def test_a_word_without_end_does_not_stall_training() -> None:
    """Merging takes time that grows with the square of a word: 900,000 letters took minutes."""
    rng = random.Random(0)
    letters = "".join(rng.choices("abcdefghij", k=300_000))
    how = TokenizerTraining()
    fed = list(tokenizer.training_sample([f"a {letters} b", " " * 5000], 1000, how, seed=0))
    assert "".join(fed) == f"a {letters} b" + " " * 5000
    assert max(map(len, fed)) <= how.max_word + 3
    started = time.process_time()
    tokenizer.train(fed, 400, how)
    assert time.process_time() - started < 20


def test_the_sample_is_bounded_and_drawn_from_everywhere() -> None:
    texts = [f"{number:06d}" * 10 for number in range(20_000)]
    how = TokenizerTraining(sample_bytes=120_000)
    drawn = list(tokenizer.training_sample(texts, 60 * len(texts), how, seed=1))
    assert sum(map(len, drawn)) == pytest.approx(120_000, rel=0.1)
    assert drawn == list(tokenizer.training_sample(texts, 60 * len(texts), how, seed=1))
    assert drawn != list(tokenizer.training_sample(texts, 60 * len(texts), how, seed=2))
    assert sum(int(text[:6]) >= 10_000 for text in drawn) / len(drawn) == pytest.approx(0.5, abs=0.06)
    assert list(tokenizer.training_sample(texts[:50], 3000, how, seed=1)) == texts[:50]


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
    saved = Tokenizer.from_file(str(bundled / "tokenizer" / "tokenizer.json"))
    packed = tokenizer.encode(saved, [text, "<|eos|> is a word"])
    assert loaded(text)["input_ids"] == [index["bos_id"], *packed[0]]
    assert loaded("<|eos|> is a word", add_special_tokens=False)["input_ids"] == packed[1]
    assert loaded.decode(packed[0]) == text


def test_training_is_the_same_with_any_number_of_threads_and_in_any_process(tmp_path: Path) -> None:
    script = (
        "import sys; from pipelines.data import tokenizer, document_files; from pathlib import Path;"
        "texts = [Path(p).read_text() for p in sorted(Path('pipelines').rglob('*.py'))];"
        "from pipelines.data.config import TokenizerTraining;"
        "tokenizer.train(texts, 800, TokenizerTraining()).tokenizer.save(sys.argv[1])"
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


ROLE_NAMES = [
    ("[CLS]", "[SEP]", "[PAD]", "[MASK]"),
    ("<s>", "</s>", "", "<mask>"),
    ("", "<|endoftext|>", "", ""),
]


def brought(folder: Path, special: tuple[str, ...], *, config: bool) -> Path:
    """Save a small foreign tokenizer with the special tokens that have a name, by tokenizer.json alone or whole."""
    foreign = Tokenizer(models.BPE())
    foreign.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    foreign.decoder = decoders.ByteLevel()
    names = [name for name in special if name]
    foreign.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=names, show_progress=False))
    folder.mkdir(parents=True)
    foreign.save(str(folder / "tokenizer.json"))
    if config:
        roles = {f"{role}_token": name for role, name in zip(tokenizer.ROLES, special, strict=True) if name}
        PreTrainedTokenizerFast(tokenizer_object=foreign, **roles).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("special", ROLE_NAMES)
def test_a_tokenizer_of_others_is_taken_with_what_it_lacks(
    special: tuple[str, ...], config: bool, tmp_path: Path
) -> None:
    folder = brought(tmp_path / "theirs", special, config=config)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    taken = tokenizer.load(folder, may_grow=True)
    assert len(set(taken.ids.values())) == 4
    for (role, token), name in zip(taken.special.items(), special, strict=True):
        assert token == (name or f"<|{role}|>")
        assert (taken.ids[role] < plain.get_vocab_size()) == bool(name)
    assert tokenizer.encode(taken.tokenizer, ["the lazy dog"]) == tokenizer.encode(plain, ["the lazy dog"])
    taken.save(tmp_path / "saved", 64)
    again = tokenizer.load(tmp_path / "saved", may_grow=False)
    assert (again.ids, again.special) == (taken.ids, dict(taken.special))


def test_to_tune_a_model_its_vocabulary_must_do(tmp_path: Path) -> None:
    kept = tokenizer.load(brought(tmp_path / "llama", ("<s>", "</s>", "<pad>", ""), config=True), may_grow=False)
    assert kept.ids["mask"] == kept.ids["pad"]
    alone = tokenizer.load(brought(tmp_path / "gpt2", ("", "<|endoftext|>", "", ""), config=True), may_grow=False)
    assert set(alone.ids) == set(tokenizer.ROLES)
    assert set(alone.ids.values()) == {alone.tokenizer.token_to_id("<|endoftext|>")}
    with pytest.raises(ConfigError, match="no token that ends a document"):
        tokenizer.load(brought(tmp_path / "none", ("", "", "", ""), config=True), may_grow=False)
    (tmp_path / "gpt2" / "chat_template.jinja").write_text("{{ x }}")
    tokenizer_files.copy(tmp_path / "gpt2", tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        assert path.read_bytes() == (tmp_path / "gpt2" / path.name).read_bytes()
    assert {"tokenizer.json", "chat_template.jinja"} <= {path.name for path in (tmp_path / "copy").iterdir()}
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        tokenizer.load(tmp_path, may_grow=True)


def test_a_tokenizer_that_is_brought_along_counts_by_its_files(tmp_path: Path) -> None:
    def identity(folder: Path) -> Any:
        return PrepareJob(prepare=PrepareConfig(tokenizer=str(folder))).identity()["prepare"]["tokenizer"]

    one = brought(tmp_path / "one", ROLE_NAMES[0], config=True)
    same = brought(tmp_path / "artifact" / "tokenizer", ROLE_NAMES[0], config=True).parent
    other = brought(tmp_path / "other", ROLE_NAMES[1], config=True)
    assert identity(one) == identity(same) != identity(other)
    with pytest.raises(ConfigError, match="nothing else that transformers reads"):
        identity(tmp_path)
    with pytest.raises(ValidationError, match="it goes with train"):
        PrepareConfig(tokenizer=str(one), tokenizer_training={"model": "unigram"})
