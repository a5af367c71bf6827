"""The fast encoder gives the ids of the slow one, or is not used."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from pipelines.data import tokenizer
from pipelines.data.config import TokenizerTraining
from pipelines.data.encoder import Encoder, byte_letters

TEXTS = [
    "Numbers 12345 and naïve café\n\n  déjà vu, isn't it?\t" * 9,
    "the quick brown fox jumps over the lazy dog " * 9,
]
KINDS = [{}, {"pre_tokenizer": "gpt2"}, {"single_digits": True}, {"max_token_length": 4}]


def trained(**how: Any) -> Tokenizer:
    return tokenizer.train(TEXTS, 420, TokenizerTraining(**how)).tokenizer


@pytest.fixture(scope="module", params=KINDS, ids=str)
def both(request: pytest.FixtureRequest) -> tuple[Tokenizer, Encoder]:
    slow = trained(**request.param)
    return slow, Encoder(slow, TEXTS)


@settings(deadline=None)
@given(st.lists(st.text() | st.text(alphabet="the quick 123'\n"), max_size=4))
def test_any_text_has_the_ids_that_tokenizers_gives_it(both: tuple[Tokenizer, Encoder], texts: list[str]) -> None:
    slow, fast = both
    assert fast.name == "tiktoken"
    assert fast(texts) == tokenizer.encode(slow, texts)


def test_a_special_token_spelled_out_is_text(both: tuple[Tokenizer, Encoder]) -> None:
    slow, fast = both
    texts = [f"a{special}b" for special in tokenizer.SPECIAL_TOKENS]
    assert fast(texts) == tokenizer.encode(slow, texts)
    assert all(token >= 4 for ids in fast(texts) for token in ids)


@pytest.mark.parametrize("how", [{"model": "unigram"}, {"model": "wordpiece"}])
def test_vocabularies_of_other_kinds_are_left_to_tokenizers(how: dict[str, Any]) -> None:
    slow = tokenizer.train(TEXTS, 620, TokenizerTraining(**how)).tokenizer
    fast = Encoder(slow, TEXTS)
    assert fast.name == "tokenizers"
    assert fast(TEXTS) == tokenizer.encode(slow, TEXTS)


def test_a_vocabulary_that_would_be_merged_otherwise_is_left_to_tokenizers() -> None:
    """Without its merge a token is never made; tiktoken knows no merges and would make it."""
    state = json.loads(trained().to_str())
    del state["model"]["merges"][0]
    slow = Tokenizer.from_str(json.dumps(state))
    fast = Encoder(slow, TEXTS)
    assert fast.name == "tokenizers"
    assert fast(TEXTS) == tokenizer.encode(slow, TEXTS)


def test_the_letters_of_bytes_are_those_of_tokenizers() -> None:
    assert sorted(byte_letters()) == sorted(ByteLevel.alphabet())
    assert sorted(byte_letters().values()) == list(range(256))
