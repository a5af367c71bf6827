"""Validation text as a measure of models in memory: which calibrator, which layers, which method is better.

Documents are chosen by hash, and only the start of each is scored, so the cost is bounded. Choices are made on other
documents than comparisons, as far as there are enough: `end` says from which side of the order by hash they are taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from models.architectures.config import Family
from pipelines.measure import heldout, intervals, scoring
from pipelines.measure.batches import plan_batches
from pipelines.measure.config import BatchSettings
from pipelines.measure.heldout import Document, Heldout
from pipelines.measure.windows import Batch
from pipelines.modelio.meta_init import is_encoder

DOCUMENT_TOKENS = 1024
"""Tokens of a document that are scored, from its start."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Yardstick:
    """Forward passes over held-out text, the same for every model."""

    batches: Sequence[Batch]
    documents: int
    family: Family
    device: str

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return sum(len(batch.targets) for batch in self.batches)

    def nats(self, model: Any, name: str) -> Floats:
        """Return the summed negative log likelihood of each document [documents].

        Raises:
            NumericError: `name`, as the model is called, gives numbers that are not finite.
        """
        scorer = scoring.Scorer(model, self.family, name, self.device)
        return scoring.document_nats(scorer, self.batches, self.documents, lambda _done, _total: None)

    def against(self, nats: Floats, base: Floats) -> dict[str, dict[str, float]]:
        """Return nats a token, their ratio and that of the perplexity to the parent's, with intervals over documents.

        Args:
            nats: `nats` of a model.
            base: those of its parent, resampled together with it.
        """
        tokens = np.bincount(np.concatenate([batch.documents for batch in self.batches]), minlength=self.documents)
        columns = (nats, base, tokens.astype(np.float64))
        found = {
            "ratio": intervals.paired_ratio(nats, base, np.ones_like(base)),
            "nats_per_token": intervals.bootstrap(lambda n, _, t: n / t, columns),
            "perplexity_ratio": intervals.bootstrap(lambda n, b, t: np.exp((n - b) / t), columns),
        }
        return {name: interval.to_json() for name, interval in found.items()}

    def loss(self, model: Any, name: str) -> float:
        """Return the mean negative log likelihood of a token, in nats."""
        return float(self.nats(model, name).sum()) / self.scored


def build(
    prepare: Path, documents: int, model: PreTrainedModel, device: torch.device | str, *, end: Literal["first", "last"]
) -> Yardstick | None:
    """Return the yardstick over at most `documents` validation documents; None where there are not two of them.

    Args:
        prepare: folder of a prepare artifact.
        documents: how many.
        model: the parent, for its family; nothing of it is run here.
        device: where models will be.
        end: from which side of the order by hash.

    Raises:
        IntegrityError: a document is damaged.
    """
    path = prepare / "documents" / "validation.jsonl.zst"
    everything = list(heldout.read_documents(path)) if path.is_file() else []
    chosen = _take(everything, max(2, documents), last=end == "last")
    if len(chosen) < 2:
        return None
    index = json.loads((prepare / "index.json").read_text(encoding="utf-8"))
    tokens = heldout.tokenize(chosen, prepare / "tokenizer" / heldout.TOKENIZER, index)
    held = Heldout(chosen, len(everything), tuple(ids[:DOCUMENT_TOKENS] for ids in tokens), index)
    settings = BatchSettings(batch_tokens=max(2048, int(index["sequence_length"])))
    family: Family = "encoder" if is_encoder(model) else "decoder"
    batches = plan_batches(settings, held, family, prepare).batches
    return Yardstick(batches, len(chosen), family, str(device))


def _take(documents: list[Document], limit: int, *, last: bool) -> tuple[Document, ...]:
    ranked = sorted(documents, key=lambda d: (hashlib.sha256(d.id.encode()).digest(), d.id), reverse=last)
    return tuple(ranked[:limit])
