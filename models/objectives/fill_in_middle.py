"""Predict the next token, in documents of which some have their middle moved to the end: a decoder learns to fill in.

A chosen document `<|bos|> prefix middle suffix <|eos|>` becomes
`<|bos|> prefix <|mask|> suffix <|mask|> middle <|eos|>` ("Efficient Training of Language Models to Fill in the Middle",
arXiv 2207.14255, prefix-suffix-middle at the level of tokens; the mask token, which decoders do not use otherwise,
stands for both sentinels). The last two tokens of its text give way to them, so that sequences keep their length. After
training, `prefix <|mask|> suffix <|mask|>` is a prompt that the model goes on with the middle of, up to the end token.

Legend: B sequences, T tokens of a sequence, L tokens of a document.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from models.architectures import documents
from models.objectives import base
from models.objectives.base import Ids, NoSettings, philox
from models.objectives.causal import next_tokens

_SENTINELS = 2
_WORDS = 3
"""Random numbers of a document: whether it is chosen, and where its middle begins and ends."""
_TWO_64 = float(2**64)


class FillingConfig(NoSettings):
    """Which documents are turned around."""

    rate: float = Field(0.5, ge=0.0, le=1.0, description="Share of the documents whose middle comes last.")


def turned(document_L: Ids, first: int, last: int, mask_id: int) -> Ids:
    """Return a document with the tokens `first` to `last` of its text (that one left out) behind all others.

    Args:
        document_L: start token, text, end token.
        first: place in the text.
        last: not smaller, and at most the length of the text less 2.
        mask_id: stands before the suffix and before the middle.
    """
    text, sentinel = document_L[1 : -1 - _SENTINELS], np.array([mask_id], dtype=np.int64)
    return np.concatenate(
        [document_L[:1], text[:first], sentinel, text[last:], sentinel, text[first:last], document_L[-1:]]
    )


class Objective(base.Objective):
    """Causal language modelling with documents turned around."""

    families = frozenset({"decoder"})
    Config = FillingConfig

    def targets(self, tokens_BT: Ids, samples_B: Ids, epochs_B: Ids) -> tuple[Ids, Ids]:
        """Return the sequences, whole documents in them turned around at the rate, and the next tokens of these."""
        context, inputs_BT = self.context, tokens_BT.copy()
        starts_BT = documents.starts(tokens_BT, bos_id=context.bos_id, pad_id=context.pad_id)
        for row, (sample, epoch) in enumerate(zip(samples_B, epochs_B, strict=True)):
            begins = np.flatnonzero(starts_BT[row])
            ends = [*begins[1:], tokens_BT.shape[1]]
            words = philox(context.seed, int(sample), _WORDS * len(begins), block=int(epoch) + 1).reshape(-1, _WORDS)
            for begin, end, (chosen, one, other) in zip(begins, ends, words, strict=True):
                if chosen / _TWO_64 < self.settings.rate and self._is_whole(document_L := tokens_BT[row, begin:end]):
                    places = len(document_L) - 2 - _SENTINELS + 1
                    first, last = sorted((int(one % np.uint64(places)), int(other % np.uint64(places))))
                    inputs_BT[row, begin:end] = turned(document_L, first, last, context.mask_id)
        return inputs_BT, next_tokens(inputs_BT, bos_id=context.bos_id, pad_id=context.pad_id)

    def _is_whole(self, document_L: Ids) -> bool:
        """Tell whether a part of a sequence is a document from start to end, with room for the sentinels."""
        ends = (int(document_L[0]), int(document_L[-1])) == (self.context.bos_id, self.context.eos_id)
        return ends and len(document_L) > 2 + _SENTINELS
