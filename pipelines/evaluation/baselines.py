"""The null arms: what two compressors and plain token counts need for the same held-out text, in bits per byte."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation import ngram
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.ngram import WittenBell
from pipelines.measure import heldout
from pipelines.measure.heldout import Heldout

_ORDERS = {"order1": 1, "order2": 2, "order3": 3}


def for_decoder(config: EvaluateConfig, prepared: Path, held: Heldout) -> dict[str, float]:
    """Return bits per byte of gzip -9, xz -9e and count models of order 1 to 3, as far as the configuration names them.

    Compressors see the documents as one text with a line break between; count models predict the tokens that the model
    predicts, the end of each document among them.
    """
    text = "\n".join(document.text for document in held.documents).encode()
    size = int(held.sizes.sum())
    found: dict[str, float] = {}
    for name in ("gzip", "xz"):
        if name in config.baselines:
            found[name] = compressed_bits(name, text) / size
    orders = {name: _ORDERS[name] for name in config.baselines if name in _ORDERS}
    if orders:
        counts = count(config, prepared, held, max(orders.values()))
        before = np.array([held.index["eos_id"]], dtype=np.int64)
        documents = [np.concatenate([before, ids]) for ids in held.tokens]
        for name, order in orders.items():
            found[name] = float(ngram.document_nats(counts, documents, order).sum()) / (size * math.log(2.0))
    return {name: found[name] for name in config.baselines if name in found}


def for_encoder(
    config: EvaluateConfig, prepared: Path, held: Heldout, masked: Sequence[NDArray[np.bool_]], size: int
) -> dict[str, float]:
    """Return bits per byte of a unigram at the masked tokens.

    Args:
        config: which baselines are wanted.
        prepared: the prepare artifact.
        held: the held-out documents.
        masked: which positions of each document are masked.
        size: bytes of all masked tokens.
    """
    if "unigram" not in config.baselines:
        return {}
    counts = count(config, prepared, held, order=1)
    targets = np.concatenate([ids[hidden] for ids, hidden in zip(held.tokens, masked, strict=True)])
    nats = -np.log(counts.probabilities(np.zeros((len(targets), 0), dtype=np.int64), targets, order=1)).sum()
    return {"unigram": float(nats) / (size * math.log(2.0))}


def compressed_bits(name: str, text: bytes) -> int:
    """Return 8 times the bytes that `gzip -9` or `xz -9e` needs for the text."""
    if name == "gzip":
        return 8 * len(gzip.compress(text, compresslevel=9, mtime=0))
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def count(config: EvaluateConfig, prepared: Path, held: Heldout, order: int) -> WittenBell:
    """Count the train tokens; start, padding and mask tokens are never outcomes."""
    index = held.index
    return WittenBell(
        heldout.train_rows(prepared, index, config.baseline_tokens),
        index["vocab_size"],
        never_predicted=(index["bos_id"], index["pad_id"], index["mask_id"]),
        order=order,
    )
