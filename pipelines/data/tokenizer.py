"""The tokenizer of a corpus: trained on its train split, or brought along.

Trained vocabularies are made of bytes (as in GPT-2): every byte is a token, so any text is encoded without an unknown
token and decoded to exactly itself. What a token may reach over is told by a pattern that cuts text into words first.

Four special tokens have a role: one starts a document, one ends it, one fills a sequence, one hides a masked token. A
special token that is spelled out in a text is text, in packing, evaluation and export.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pipelines.core.errors import ConfigError
from pipelines.data import tokenizer_files
from pipelines.data.config import TokenizerTraining
from pipelines.data.tokenizer_files import FILE

BOS, EOS, PAD, MASK = "<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, MASK)
"""Their ids are their positions here, 0 to 3, in a tokenizer that was trained here."""
ROLES = ("bos", "eos", "pad", "mask")

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    ("llama3", False): rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",
    ("llama3", True): rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_LETTERS}|\p{{N}}|{_REST}",
    ("gpt2", False): r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    ("gpt2", True): r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
"""(pre_tokenizer, single_digits) -> what a word is, for `tokenizers` and tiktoken alike."""
_KNOWN_NAMES = {
    "bos": (BOS, "<|begin_of_text|>", "<s>", "<bos>", "[CLS]"),
    "eos": (EOS, "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[SEP]"),
    "pad": (PAD, "<pad>", "[PAD]"),
    "mask": (MASK, "<mask>", "[MASK]"),
}
"""What others call the roles, where nothing but tokenizer.json is there to say so."""


@dataclass(frozen=True)
class CorpusTokenizer:
    """A tokenizer and its special tokens."""

    tokenizer: Tokenizer
    special: Mapping[str, str]
    """Role -> token."""

    @property
    def ids(self) -> dict[str, int]:
        """Role -> id."""
        return {role: int(self.tokenizer.token_to_id(token) or 0) for role, token in self.special.items()}

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return int(self.tokenizer.get_vocab_size())

    def save(self, folder: Path, model_max_length: int) -> None:
        """Write a Hugging Face tokenizer folder that `AutoTokenizer.from_pretrained` loads.

        It puts the start token before a text, as packing does.

        Args:
            folder: created.
            model_max_length: tokens after which the tokenizer warns: the length that models are trained on.
        """
        from transformers import PreTrainedTokenizerFast

        bos = self.special["bos"]
        self.tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, self.ids["bos"])]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer,
            **{f"{role}_token": token for role, token in self.special.items()},
            model_max_length=model_max_length,
            clean_up_tokenization_spaces=False,
            split_special_tokens=True,
        ).save_pretrained(folder)


# ---- trained ---------------------------------------------------------------------------------------------------------


def train(texts: Iterable[str], vocab_size: int, settings: TokenizerTraining) -> CorpusTokenizer:
    """Train on a stream of texts; the same texts give the same tokenizer.

    Args:
        texts: what it learns from.
        vocab_size: an upper bound; a small corpus runs out of pairs to merge before it is reached.
        settings: which kind, and what a word is.
    """
    pattern = PATTERNS[settings.pre_tokenizer, settings.single_digits]
    words = [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    common: dict[str, Any] = {
        "show_progress": False,
        "special_tokens": list(SPECIAL_TOKENS),
        "initial_alphabet": alphabet,
    }
    decoder: Any = decoders.ByteLevel()
    trainer: Any
    if settings.model == "bpe":
        tokenizer = Tokenizer(models.BPE())
        common |= {} if settings.max_token_length is None else {"max_token_length": settings.max_token_length}
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, **common)
    elif settings.model == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        common |= {} if settings.max_token_length is None else {"max_piece_length": settings.max_token_length}
        trainer = trainers.UnigramTrainer(vocab_size=vocab_size, **common)
    else:
        # A longer word would be one unknown token, and is found in time that grows with its square.
        words.append(pre_tokenizers.Split(Regex(f".{{{_WORDPIECE_BYTES // 4}}}"), behavior="isolated"))
        tokenizer = Tokenizer(models.WordPiece(max_input_chars_per_word=_WORDPIECE_BYTES))
        decoder = decoders.Sequence([decoders.Replace(_CONTINUED, ""), decoders.Fuse(), decoders.ByteLevel()])
        size = max(vocab_size - len(alphabet), len(SPECIAL_TOKENS) + len(alphabet))
        common |= {"continuing_subword_prefix": _CONTINUED}
        trainer = trainers.WordPieceTrainer(vocab_size=size, min_frequency=2, **common)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoder
    tokenizer.train_from_iterator(texts, trainer)
    if settings.model == "wordpiece":
        tokenizer.model = _with_every_byte(tokenizer, alphabet)
    return CorpusTokenizer(tokenizer, dict(zip(ROLES, SPECIAL_TOKENS, strict=True)))


_CONTINUED = "\u2581"
"""Marks a piece that goes on with a word in a WordPiece vocabulary: no letter of the alphabet of bytes."""
_WORDPIECE_BYTES = 400


def _with_every_byte(tokenizer: Tokenizer, alphabet: Sequence[str]) -> models.WordPiece:
    """Return the WordPiece model with every byte also as the continuation of a word: nothing is unknown to it."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for letter in alphabet:
        vocabulary.setdefault(_CONTINUED + letter, len(vocabulary))
    return models.WordPiece(
        vocabulary,
        unk_token=alphabet[0],
        continuing_subword_prefix=_CONTINUED,
        max_input_chars_per_word=_WORDPIECE_BYTES,
    )


def training_sample(texts: Iterable[str], total_bytes: int, settings: TokenizerTraining, seed: int) -> Iterator[str]:
    """Yield the texts that a tokenizer is trained on: about `sample_bytes` of them, drawn one by one, in their order.

    An unbroken run of letters, or of spaces, is cut where it is longer than any word: training takes time that grows
    with the square of a word's length, and one of 900,000 letters stalls it.

    Args:
        texts: all there are.
        total_bytes: their size.
        settings: how much is wanted.
        seed: of the draw.
    """
    share = settings.sample_bytes / max(total_bytes, 1)
    draws = np.random.Generator(np.random.Philox(key=[seed, _PURPOSE]))
    longer = re.compile(rf"(?:\S{{{settings.max_word}}}|\s{{{settings.max_word}}})(?=.)", re.DOTALL)
    for text in texts:
        if share < 1.0 and draws.random() >= share:
            continue
        start = 0
        for run in longer.finditer(text):
            yield text[start : run.end()]
            start = run.end()
        yield text[start:]


_PURPOSE = 0x70
"""Sets the random stream of this draw apart from others with the same seed."""


# ---- brought along ---------------------------------------------------------------------------------------------------


def load(folder: Path, *, may_grow: bool) -> CorpusTokenizer:
    """Return a tokenizer that was trained elsewhere.

    Args:
        folder: with tokenizer.json or what else transformers saves of a tokenizer; also an artifact of prepare or of a
            training, which has it in `tokenizer` or `model`.
        may_grow: whether tokens for roles that it lacks may be added. The vocabulary of a model stays as it is: one
            that was trained without a start token has met its end token between documents, and is padded with it.

    Raises:
        ConfigError: there is none, or a model's has no token that ends a document.
    """
    tokenizer, named = _read(tokenizer_files.place_of(folder))
    special: dict[str, str] = {}
    for role in ("eos", "bos", "pad", "mask"):
        candidates = (*named.get(role, ()), *_KNOWN_NAMES[role])
        known = (t for t in candidates if tokenizer.token_to_id(t) is not None and t not in special.values())
        special[role] = next(known, "")
    if missing := [role for role in ROLES if not special[role]]:
        if not may_grow:
            if "eos" in missing:
                raise ConfigError(
                    f"the tokenizer of {folder} has no token that ends a document, neither eos_token nor sep_token",
                    hint="name one in its tokenizer_config.json",
                )
            mask = special["pad"] or special["eos"]  # asked of encoders only, and these have one
            special |= {role: mask if role == "mask" else special["eos"] for role in missing}
            return CorpusTokenizer(tokenizer, {role: special[role] for role in ROLES})
        names = dict(zip(ROLES, SPECIAL_TOKENS, strict=True))
        tokenizer.add_special_tokens([AddedToken(names[role], special=True, normalized=False) for role in missing])
        special |= {role: names[role] for role in missing}
    return CorpusTokenizer(tokenizer, {role: special[role] for role in ROLES})


def _read(folder: Path) -> tuple[Tokenizer, dict[str, tuple[str, ...]]]:
    """Return a tokenizer and, where its folder says so, the tokens of each role, the best first."""
    if not (folder / "tokenizer_config.json").is_file() and (folder / FILE).is_file():
        return Tokenizer.from_file(str(folder / FILE)), {}
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{folder}: transformers cannot load this tokenizer: {error}") from error
    if (backend := getattr(loaded, "backend_tokenizer", None)) is None:
        raise ConfigError(
            f"{folder}: {type(loaded).__name__} has no fast form", hint="save it as tokenizer.json with transformers"
        )
    names = {"bos": ("bos", "cls"), "eos": ("eos", "sep"), "pad": ("pad",), "mask": ("mask",)}
    return backend, {
        role: tuple(str(t) for kind in kinds if (t := getattr(loaded, f"{kind}_token", None)) is not None)
        for role, kinds in names.items()
    }


# ---- used ------------------------------------------------------------------------------------------------------------


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text; a special token spelled out in a text is text, not control."""
    _take_text_whole(tokenizer)
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def ends(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return, for each token that `encode` makes of a text, how many of its characters the tokens up to it cover."""
    _take_text_whole(tokenizer)
    return [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]


def _take_text_whole(tokenizer: Tokenizer) -> None:
    """Encode text alone and all of it: a tokenizer.json may say to cut texts, or to fill them up, to some length."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
