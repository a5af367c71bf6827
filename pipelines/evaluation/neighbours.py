"""Which held-out sentences an encoder takes for nearest to a text: by the cosine of its mean-pooled hidden states.

Vectors are centred on the mean of the sentences, because pooled vectors of one model share a large common part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.measure import heldout, scoring
from pipelines.measure.heldout import Document
from pipelines.measure.prompts import Prompter

MOST = 512
"""Sentences that are compared at most."""
_END = re.compile(r"(?<=[.!?;])\s+|\n\s*\n")
_FEWEST_WORDS, _LONGEST = 4, 400
_DIGITS = 4


@dataclass(frozen=True)
class Neighbour:
    """A held-out sentence."""

    text: str
    cosine: float
    """To the prompt; rounded, as the last digits differ from machine to machine."""
    document: str
    """Id of the document that it stands in."""


def sentences(documents: Sequence[Document]) -> list[Document]:
    """Return at most `MOST` sentences of documents, picked by hash, each with the id of its document as its source."""
    found: dict[str, Document] = {}
    for document in documents:
        for part in _END.split(document.text):
            text = " ".join(part.split())
            if len(text.split()) >= _FEWEST_WORDS and len(text) <= _LONGEST:
                found.setdefault(text, Document(id=text, text=text, source=document.id))
    return list(heldout.choose(list(found.values()), MOST))


def nearest(prompter: Prompter, prompts: Sequence[str], among: Sequence[Document], count: int) -> list[list[Neighbour]]:
    """Return the `count` sentences nearest to each prompt, the nearest first.

    Of a text that is longer than the sequences that the model was trained on, only the beginning counts.
    """
    known_QD = np.stack([_vector(prompter, sentence.text) for sentence in among])
    centre_D = known_QD.mean(axis=0)
    known_QD = _unit(known_QD - centre_D)
    rows = []
    for prompt in prompts:
        cosine_Q = known_QD @ _unit(_vector(prompter, prompt) - centre_D)
        best = np.argsort(-cosine_Q, kind="stable")[:count]
        rows.append([Neighbour(among[n].text, round(float(cosine_Q[n]), _DIGITS), among[n].source) for n in best])
    return rows


def _vector(prompter: Prompter, text: str) -> NDArray[np.float64]:
    ids = prompter.whole(text)[: prompter.positions]
    return scoring.embed(prompter.scorer, np.array(ids, dtype=np.int64))


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return scaled
