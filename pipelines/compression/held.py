"""How well a model predicts the validation split, sequence by sequence: the yardstick between a child and its arms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.architectures import predict
from pipelines.compression.load import load_model
from pipelines.evaluation.comparison import bootstrap
from pipelines.training.feed import Feed

Floats = NDArray[np.float64]


def sequence_nats(folder: Path, feed: Feed) -> tuple[Floats, Floats]:
    """Return summed nats and number of targets of every validation sequence [N] of the model in `folder`."""
    model = load_model(folder).to(feed.ranks.device)
    nats, targets = [], []
    with torch.no_grad():
        for batch in feed.validation_batches():
            # The whole model, not its parts: compressed-tensors unpacks at the first pass of the whole.
            logits_BTV = model(input_ids=batch.inputs_BT).logits
            for logits_TV, targets_T in zip(logits_BTV, batch.targets_BT, strict=True):
                if count := int((targets_T != predict.IGNORED).sum()):
                    nats.append(float(predict.summed_nats(logits_TV, targets_T)))
                    targets.append(float(count))
    return np.array(nats), np.array(targets)


def table(folders: Mapping[str, Path], parent: Path, feed: Feed) -> dict[str, dict[str, Any]]:
    """Return a row for each model: nats per token, their ratio and that of the perplexity to the parent's.

    With intervals over sequences, on the same resamples for child and parent.
    """
    base, targets = sequence_nats(parent, feed)
    rows = {"parent": _row(base, base, targets)}
    for name, folder in folders.items():
        rows[name] = _row(sequence_nats(folder, feed)[0], base, targets)
    return rows


def _row(nats: Floats, base: Floats, targets: Floats) -> dict[str, Any]:
    own = bootstrap(lambda n, t: n / t, (nats, targets))
    ratio = bootstrap(lambda n, b: n / b, (nats, base))
    perplexity = bootstrap(lambda n, b, t: np.exp((n - b) / t), (nats, base, targets))
    return {"nats_per_token": own.to_json(), "ratio": ratio.to_json(), "perplexity_ratio": perplexity.to_json()}
