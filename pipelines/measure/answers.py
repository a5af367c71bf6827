"""What is asked of models, and their answers as text for people: `samples.json`, `ingot try`. No torch.

The text may hold anything: whoever shows it escapes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.measure.config import SamplingSettings

FILE = "samples.json"
"""Of an evaluate artifact: the answers at fixed prompts."""


@dataclass(frozen=True)
class Question:
    """What to ask of a model."""

    prompts: tuple[str, ...]
    sampling: SamplingSettings
    """How a decoder's tokens are drawn."""
    new_tokens: int | None
    """Tokens that a decoder writes at most; see `Prompter.continuation`."""
    count: int
    """Words that an encoder gives for each mask, or neighbours."""
    prepared: Path | None = None
    """Prepare artifact among whose held-out sentences an encoder looks for neighbours; None: it fills in words."""


def lines(answer: Mapping[str, Any]) -> list[str]:
    """Return the lines of one answer: a continuation, the words for each mask, or the neighbours, the nearest first."""
    if "text" in answer:
        return str(answer["text"]).splitlines() or ["(nothing)"]
    if "neighbours" in answer:
        return [f"{each['cosine']:.3f}  {each['text']}  ({each['document']})" for each in answer["neighbours"]]
    was = f" (it was: {answer['answer']})" if answer.get("answer") else ""
    rows = [[f"{word['text'].strip()} {word['probability']:.3f}" for word in words] for words in answer["masks"]]
    return [", ".join(words) + was for words in rows]
