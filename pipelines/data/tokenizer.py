"""The tokenizer: byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2), trained on the train split only.

Every byte is a token, so any text is encoded without an unknown token and decoded to exactly itself. Digits stand
alone, which is what arithmetic and verse numbers want.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipelines.core.errors import ConfigError

BOS, EOS, PAD, MASK = "<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, MASK)
"""Their ids are their positions here: 0 to 3."""


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on a stream of texts; the same texts give the same tokenizer.

    Args:
        texts: the train split.
        vocab_size: an upper bound; a small corpus runs out of pairs to merge before it is reached.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load(folder: Path) -> Tokenizer:
    """Return the tokenizer of a model folder, to pack another corpus with.

    Raises:
        ConfigError: there is none, or its special tokens are not those that packing puts in.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no tokenizer.json", hint="set prepare.tokenizer to train")
    tokenizer = Tokenizer.from_file(str(path))
    found = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    if found != list(range(len(SPECIAL_TOKENS))):
        raise ConfigError(
            f"the tokenizer of {folder} gives {', '.join(SPECIAL_TOKENS)} the ids {found}, 0 to 3 are needed",
            hint="only tokenizers that Ingot trained can pack another corpus",
        )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text; a special token spelled out in a text is text, not control."""
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def save(tokenizer: Tokenizer, folder: Path, model_max_length: int) -> None:
    """Write a Hugging Face tokenizer folder that `AutoTokenizer.from_pretrained` loads.

    Args:
        tokenizer: what `train` returned.
        folder: created.
        model_max_length: tokens after which the tokenizer warns: the length that models are trained on.
    """
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        mask_token=MASK,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
