"""Ask one model: loaded, asked, released, so that memory never holds two."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from models.architectures.config import Family
from pipelines.core.artifact import read_json
from pipelines.core.errors import ConfigError
from pipelines.evaluation import neighbours
from pipelines.measure import heldout, openings, scoring
from pipelines.measure.answers import Question
from pipelines.measure.heldout import Document
from pipelines.measure.openings import Opening
from pipelines.measure.prompts import Prompter


def ask(model: Path, device: str, question: Question) -> list[dict[str, Any]]:
    """Return a model's answer to each prompt as JSON values: `text`, `masks` or `neighbours`.

    Args:
        model: the model folder.
        device: where it computes.
        question: what to ask.

    Raises:
        IntegrityError: the folder does not hold a readable model.
        ConfigError: a prompt is too long, or has no mask for an encoder.
        NumericError: the model's predictions are not finite.
    """
    try:
        return _answers(Prompter(scoring.load(model, device), model), question)
    finally:
        gc.collect()  # modules and their hooks refer to each other


def _answers(prompter: Prompter, question: Question) -> list[dict[str, Any]]:
    if question.prepared is not None:
        known = neighbours.sentences(_documents(question.prepared))
        rows = neighbours.nearest(prompter, question.prompts, known, question.count)
        return [{"neighbours": [vars(each) for each in row]} for row in rows]
    if prompter.scorer.family == "encoder":
        found = (prompter.masked(prompt, question.count) for prompt in question.prompts)
        return [{"masks": [[vars(word) for word in words] for words in masks]} for masks in found]
    return [
        {"text": prompter.continuation(prompt, question.sampling, question.new_tokens)} for prompt in question.prompts
    ]


def first_words(model: Path, family: Family, prepared: Path) -> list[Opening]:
    """Return prompts from the held-out documents of a prepare artifact; the model is not loaded.

    Raises:
        ConfigError: the documents give none.
    """
    tokenizer = Tokenizer.from_file(str(model / heldout.TOKENIZER))
    positions = read_json(model / "config.json")["max_position_embeddings"]
    found = openings.of(_documents(prepared), tokenizer, family, count=openings.COUNT, positions=positions)
    if not found:
        raise ConfigError(f"the held-out documents of {prepared} give no prompt", hint="give one with --prompt")
    return found


def _documents(prepared: Path) -> Sequence[Document]:
    return list(heldout.read_documents(prepared / "documents" / "test.jsonl.zst"))
