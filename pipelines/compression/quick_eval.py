"""Validation text as a quick judge of models in memory: which calibrator, which layers, which method is better.

Documents are chosen by hash, and only the start of each is scored, so the cost is bounded. Choices are made on other
documents than comparisons, as far as there are enough: `end` says from which side of the order by hash they are taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from models.architectures.config import Family
from pipelines.core.artifact import read_json
from pipelines.measure import heldout, scoring
from pipelines.measure.batches import plan_batches
from pipelines.measure.config import BatchSettings
from pipelines.measure.heldout import Heldout
from pipelines.measure.windows import Batch

DOCUMENT_TOKENS = 1024
"""Tokens of a document that are scored, from its start."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class QuickEval:
    """Forward passes over held-out text, the same for every model."""

    batches: Sequence[Batch]
    documents: int
    family: Family
    device: torch.device

    @property
    def tokens_D(self) -> NDArray[np.int64]:  # noqa: N802 - a shape letter
        """Number of scored tokens of each document."""
        return np.bincount(np.concatenate([b.documents for b in self.batches]), minlength=self.documents)

    def nats(self, model: PreTrainedModel, name: str) -> Floats:
        """Return the summed negative log likelihood of each document [documents].

        Args:
            model: a model on `device`.
            name: how errors call it.

        Raises:
            NumericError: it gives numbers that are not finite.
        """
        scorer = scoring.Scorer(model, self.family, name, str(self.device))
        return scoring.document_nats(scorer, self.batches, self.documents, lambda _done, _total: None)

    def loss(self, model: PreTrainedModel, name: str) -> float:
        """Return the mean negative log likelihood of a token, in nats."""
        return float(self.nats(model, name).sum()) / int(self.tokens_D.sum())


def build(
    prepare: Path, documents: int, family: Family, device: torch.device, *, end: Literal["first", "last"]
) -> QuickEval | None:
    """Lay out at most `documents` validation documents; None where there are fewer than two, which intervals need.

    Args:
        prepare: folder of a prepare artifact.
        documents: how many; at least two are taken.
        family: of the models.
        device: where models are.
        end: from which side of the order by hash.

    Raises:
        IntegrityError: a document is damaged.
    """
    path = prepare / "documents" / "validation.jsonl.zst"
    everything = list(heldout.read_documents(path)) if path.is_file() else []
    ranked = sorted(everything, key=lambda d: (hashlib.sha256(d.id.encode()).digest(), d.id), reverse=end == "last")
    chosen = tuple(ranked[: max(2, documents)])
    if len(chosen) < 2:
        return None
    index = read_json(prepare / "index.json")
    tokens = heldout.tokenize(chosen, prepare / "tokenizer" / heldout.TOKENIZER, index)
    text = Heldout(chosen, len(everything), tuple(ids[:DOCUMENT_TOKENS] for ids in tokens), index)
    settings = BatchSettings(batch_tokens=max(2048, int(index["sequence_length"])))
    return QuickEval(plan_batches(settings, text, family, prepare).batches, len(chosen), family, device)
