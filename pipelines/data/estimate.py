"""What the prepare stage will take, from the size of the corpus and the vocabulary."""

from __future__ import annotations

import math
from typing import Any

from pipelines.core.artifact import Artifact
from pipelines.core.estimate import Estimate, EstimateContext, Time
from pipelines.data.config import PrepareConfig, PrepareJob

_SPLITS = ("train", "validation", "test")
_TEXT_OF_COMPRESSED = 3.6
"""Bytes of text in a byte of compressed JSON Lines."""
_TEXT_RATE = 0.2e6
"""Bytes of text a second that a worker cleans, compares and tokenizes."""
_DOCUMENT = 5000
"""Bytes of text of a document, where they have not been counted."""
_START_S = 5.0
_BYTES_PER_DOUBLING = 0.53
"""What a doubling of a vocabulary beyond single bytes adds to the bytes of a token, in English and code."""
_COMPRESSED_AGAIN = 0.35
"""Size of the documents beside the tokens, over their text."""
_PROCESS = 400_000_000
"""A process with the tokenizer and the text that it works on at a time."""
_TEXT_HELD = 4
"""Bytes in memory for each byte of text: documents, shingles, the tokenizer's counts."""


def estimate_prepare(job: PrepareJob, context: EstimateContext) -> Estimate:
    """Return what preparing takes; of an artifact that exists, or of one of the same corpus, the text is known."""
    prepare, text = job.prepare, _text_bytes(context)
    facts: dict[str, Any] = {"vocab_size": prepare.vocab_size, "sequence_length": prepare.sequence_length}
    splits = _counted_tokens(context)
    if splits is not None and context.made is not None:
        facts["vocab_size"] = context.made.manifest.summary["vocab_size"]
        facts["test_documents"] = context.made.manifest.summary["test_documents"]
        if prepare.pack_by == "source":
            facts["sources"] = context.made.manifest.summary["sources"]
    elif text is not None:
        splits = _expected_tokens(prepare, text)
        facts["test_documents"] = max(1, round(prepare.test_fraction * text / _DOCUMENT))
    if splits is None:
        return Estimate(facts=facts)
    width = 2 if facts["vocab_size"] <= 1 << 16 else 4
    count = sum(splits.values())
    text = text or count * bytes_per_token(facts["vocab_size"])
    stated = Time(_START_S + text / (_TEXT_RATE * prepare.workers), "stated", "no earlier run; an assumed rate")
    return Estimate(
        memory={"processes": _PROCESS * (1 + prepare.workers), "text": round(_TEXT_HELD * text)},
        time=context.scaled_duration(text, _text_of) or stated,
        disk={"tokens": width * count, "documents": round(_COMPRESSED_AGAIN * text)},
        facts=facts | {f"{name}_tokens": number for name, number in splits.items()},
    )


def _counted_tokens(context: EstimateContext) -> dict[str, int] | None:
    """Return the tokens of each split of the artifact itself; None where there is none that says."""
    summary = {} if context.made is None else context.made.manifest.summary
    counts = {name: summary.get(f"{name}_tokens") for name in _SPLITS}
    return None if "vocab_size" not in summary or None in counts.values() else counts  # type: ignore[return-value]


def _expected_tokens(prepare: PrepareConfig, text: float) -> dict[str, int]:
    """Return the tokens of each split of so many bytes of text."""
    tokens = text / bytes_per_token(prepare.vocab_size)
    held_out = {"validation": prepare.validation_fraction, "test": prepare.test_fraction}
    return {name: round(tokens * held_out.get(name, 1.0 - sum(held_out.values()))) for name in _SPLITS}


def bytes_per_token(vocab_size: int) -> float:
    """Return the bytes of text in a token, about: 1 of single bytes, 3.1 of 4,096 tokens, 4.7 of 32,000."""
    return 1.0 + _BYTES_PER_DOUBLING * max(0.0, math.log2(vocab_size / 260))


def _text_bytes(context: EstimateContext) -> float | None:
    """Return the bytes of text in the corpus: counted by a run over the same corpus, else told by its size."""
    if context.made is not None:
        return _text_of(context.made)
    same = (each for each in context.history if each.manifest.identity["inputs"].get("data") == context.corpus)
    counted = next((text for each in same if (text := _text_of(each))), None)
    if counted is not None or context.corpus_bytes is None:
        return counted
    return _TEXT_OF_COMPRESSED * context.corpus_bytes


def _text_of(found: Artifact) -> float | None:
    sizes = [found.manifest.summary.get(f"{name}_bytes") for name in _SPLITS]
    known = [size for size in sizes if isinstance(size, int)]
    return float(sum(known)) if len(known) == len(sizes) else None
