"""Text to token ids, fast: a byte-level BPE vocabulary runs in tiktoken, which has no offsets and no pipeline to keep.

The two merge alike. tiktoken merges neighbours whose bytes together are a token, the lowest id first; `tokenizers`
merges the pairs that training merged, in their order. A token's own pair is the only one of its bytes that merging
leads to (inside of a token nothing depends on what stands around it), and ids are in the order of training. What could
differ are two regular-expression engines that disagree on a letter, and vocabularies that others made: ids are compared
on a sample before anything is encoded, and where they differ `tokenizers` does it all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import tiktoken
from tokenizers import Tokenizer

from pipelines.data import tokenizer as tokenization


class Encoder:
    """Encodes texts as `tokenizer.encode` does.

    Args:
        tokenizer: what to encode with.
        sample: texts that both ways are compared on.
        threads: that tiktoken works with.
    """

    def __init__(self, tokenizer: Tokenizer, sample: Sequence[str], threads: int = 1) -> None:
        self._tokenizer, self._threads = tokenizer, threads
        self._fast = _tiktoken(tokenizer)
        if self._fast is not None and self(sample) != tokenization.encode(tokenizer, sample):
            self._fast = None

    @property
    def name(self) -> str:
        """The library at work: tiktoken or tokenizers."""
        return "tokenizers" if self._fast is None else "tiktoken"

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text; a special token spelled out in a text is text."""
        if self._fast is None:
            return tokenization.encode(self._tokenizer, texts)
        return self._fast.encode_ordinary_batch(list(texts), num_threads=self._threads)


def _tiktoken(tokenizer: Tokenizer) -> tiktoken.Encoding | None:
    """Return the same vocabulary in tiktoken; None where it is of another kind."""
    state = json.loads(tokenizer.to_str())
    model, pattern = state["model"], word_pattern(state["pre_tokenizer"])
    plain = model["type"] == "BPE" and not any(
        model.get(key) for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                                   "byte_fallback", "ignore_merges")
    )  # fmt: skip
    special = {token["content"] for token in state["added_tokens"] if token["special"]}
    others = [token for token in state["added_tokens"] if not token["special"]]
    if not plain or pattern is None or state["normalizer"] is not None or others:
        return None
    letters = byte_letters()
    words = {word: number for word, number in model["vocab"].items() if word not in special}
    if any(letter not in letters for word in words for letter in word) or not set(letters) <= set(words):
        return None
    ranks = {bytes(letters[letter] for letter in word): number for word, number in words.items()}
    return tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def word_pattern(pre_tokenizer: Any) -> str | None:
    """Return the regular expression of a pre-tokenizer that cuts words by one and then writes bytes; else None."""
    match pre_tokenizer:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return tokenization.PATTERNS["gpt2", False]
    return None


def byte_letters() -> dict[str, int]:
    """Return the letter that byte-level vocabularies write each byte as -> the byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
