"""From a prompt to what a model makes of it: a decoder's continuation, the words that an encoder puts for a mask.

Prompts become tokens as documents do in training: the start token before them, and a special token that is spelled out
in a text is text. So a prompt is the beginning of a document. Only the mask of an encoder's prompt is a token.

Legend: B sequences (one), T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.data import tokenizer as tokenization
from pipelines.measure.config import SamplingSettings
from pipelines.measure.heldout import TOKENIZER
from pipelines.measure.openings import MASKS
from pipelines.measure.scoring import Scorer, refuse_not_finite

NEW_TOKENS = 64
"""Tokens that are written where nobody says how many."""
_DIGITS = 4


@dataclass(frozen=True)
class Word:
    """One guess for a mask."""

    text: str
    probability: float
    """Rounded: the last digits differ from machine to machine."""


class Prompter:
    """A loaded model with its tokenizer.

    Args:
        scorer: the model.
        folder: its folder.

    Raises:
        IntegrityError: the folder has no tokenizer.
    """

    def __init__(self, scorer: Scorer, folder: Path) -> None:
        path = folder / TOKENIZER
        if not path.is_file():
            raise IntegrityError(f"{path} is missing: without it text cannot become tokens")
        self.scorer = scorer
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        config = scorer.model.config
        self._bos, self._eos, self._pad = config.bos_token_id, config.eos_token_id, config.pad_token_id
        self.positions: int = config.max_position_embeddings
        """Tokens of the sequences that it was trained on."""

    def continuation(self, prompt: str, sampling: SamplingSettings, new_tokens: int | None) -> str:
        """Return what a decoder writes after a prompt, up to its end token.

        Draws depend on the seed alone: on neither the prompts nor the models before this one.

        Args:
            prompt: the beginning of a document.
            sampling: how tokens are drawn.
            new_tokens: tokens to write at most; None: `NEW_TOKENS`, or as many as the model was trained to read.

        Raises:
            ConfigError: prompt and text are longer than the sequences that the model was trained on.
            NumericError: its predictions are not finite.
        """
        ids = [self._bos, *tokenization.encode(self.tokenizer, [prompt])[0]]
        count = self._room(len(ids), new_tokens)
        ids_BT = torch.tensor([ids], device=self.scorer.device)
        drawn = sampling.temperature > 0.0
        options = GenerationConfig(
            max_new_tokens=count,
            do_sample=drawn,
            # Without these three transformers would fill in its own, a cut after 50 tokens among them.
            temperature=sampling.temperature if drawn else 1.0,
            top_k=(sampling.top_k or 0) if drawn else 50,
            top_p=sampling.top_p or 1.0,
            eos_token_id=self._eos,
            pad_token_id=self._pad,
            use_cache=True,
        )
        self.scorer.check_device()
        on_gpu = [self.scorer.model.device] if self.scorer.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=on_gpu), torch.inference_mode():
            torch.manual_seed(sampling.seed or 0)
            written_BT = self.scorer.model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                generation_config=options,
                logits_processor=LogitsProcessorList([_Finite(self.scorer.name)]),
            )
        text: str = self.tokenizer.decode(written_BT[0, len(ids) :].tolist(), skip_special_tokens=True)
        return text

    def masked(self, prompt: str, count: int) -> list[list[Word]]:
        """Return the likeliest words for every mask of a prompt, each with all masks in place.

        Args:
            prompt: a whole text with `<|mask|>`, `[MASK]` or `___` where a word is missing.
            count: words for each mask.

        Raises:
            ConfigError: there is no mask in it, or it is too long.
            NumericError: the model's predictions are not finite.
        """
        pieces = MASKS.split(prompt)
        if len(pieces) == 1:
            raise ConfigError(
                f"there is no mask in {prompt!r}", hint="an encoder fills in words: write [MASK] or ___ for one"
            )
        ids, places = [self._bos], []
        for number, tokens in enumerate(tokenization.encode(self.tokenizer, pieces)):
            if number:
                places.append(len(ids))
                ids.append(self.tokenizer.token_to_id(tokenization.MASK))
            ids += tokens
        ids.append(self._eos)
        self._room(len(ids), 0)
        self.scorer.check_device()
        ids_BT = torch.tensor([ids], device=self.scorer.device)
        with torch.inference_mode():
            logits_NV: Tensor = self.scorer.model(input_ids=ids_BT).logits[0, places].float()
            refuse_not_finite(logits_NV, self.scorer.name)
            top = logits_NV.softmax(dim=-1).topk(min(count, logits_NV.shape[-1]))
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [[self._word(*guess) for guess in zip(*row, strict=True)] for row in rows]

    def whole(self, text: str) -> list[int]:
        """Return the token ids of a text as of a whole document: with the start and the end token."""
        return [self._bos, *tokenization.encode(self.tokenizer, [text])[0], self._eos]

    def _word(self, token: int, probability: float) -> Word:
        return Word(self.tokenizer.decode([token], skip_special_tokens=False), round(probability, _DIGITS))

    def _room(self, tokens: int, wanted: int | None) -> int:
        """Return how many tokens may follow so many.

        Raises:
            ConfigError: there is no room for those that are wanted.
        """
        room = self.positions - tokens
        count = min(NEW_TOKENS, room) if wanted is None else wanted
        if count > room or (wanted is None and room < 1):
            more = f" and {count} new ones" if wanted else ""
            raise ConfigError(
                f"{tokens} tokens of prompt{more}: {self.scorer.name} was trained on sequences of {self.positions}",
                hint="give a shorter prompt" + (f", or let it write {room}" if wanted and room > 0 else ""),
            )
        return count


class _Finite(LogitsProcessor):
    """Refuses logits that are not finite, before anything is drawn from them."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        refuse_not_finite(scores, self._name)
        return scores
