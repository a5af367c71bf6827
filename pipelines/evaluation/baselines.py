"""The baselines: what two compressors and plain token counts need for the same held-out text, in bits per byte."""

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


def for_decoder(config: EvaluateConfig, prepared: Path, documents: Heldout) -> dict[str, float]:
    """Return bits per byte of gzip -9, xz -9e and count models of order 1 to 3, as far as the configuration names them.

    Compressors see the documents as one text with a line break between; count models predict the tokens that the model
    predicts, the end of each document among them.
    """
    text = "\n".join(document.text for document in documents.documents).encode()
    size = int(documents.sizes.sum())
    bits: dict[str, float] = {}
    for name in ("gzip", "xz"):
        if name in config.baselines:
            bits[name] = compressed_bits(name, text) / size
    orders = {name: _ORDERS[name] for name in config.baselines if name in _ORDERS}
    if orders:
        counts = count(config, prepared, documents, max(orders.values()))
        before = np.array([documents.index["eos_id"]], dtype=np.int64)
        streams = [np.concatenate([before, ids]) for ids in documents.tokens]
        for name, order in orders.items():
            bits[name] = float(ngram.document_nats(counts, streams, order).sum()) / (size * math.log(2.0))
    return {name: bits[name] for name in config.baselines if name in bits}


def for_encoder(
    config: EvaluateConfig, prepared: Path, documents: Heldout, masked: Sequence[NDArray[np.bool_]], size: int
) -> dict[str, float]:
    """Return bits per byte of a unigram at the masked tokens.

    Args:
        config: which baselines are wanted.
        prepared: the prepare artifact.
        documents: the held-out documents.
        masked: which positions of each document are masked.
        size: bytes of all masked tokens.
    """
    if "unigram" not in config.baselines:
        return {}
    counts = count(config, prepared, documents, order=1)
    targets = np.concatenate([ids[hidden] for ids, hidden in zip(documents.tokens, masked, strict=True)])
    nats = -np.log(counts.probabilities(np.zeros((len(targets), 0), dtype=np.int64), targets, order=1)).sum()
    return {"unigram": float(nats) / (size * math.log(2.0))}


def compressed_bits(name: str, text: bytes) -> int:
    """Return 8 times the bytes that `gzip -9` or `xz -9e` needs for the text."""
    if name == "gzip":
        return 8 * len(gzip.compress(text, compresslevel=9, mtime=0))
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def count(config: EvaluateConfig, prepared: Path, documents: Heldout, order: int) -> WittenBell:
    """Count the train tokens; start, padding and mask tokens are never outcomes."""
    index = documents.index
    return WittenBell(
        heldout.train_rows(prepared, index, config.baseline_tokens),
        index["vocab_size"],
        never_predicted=(index["bos_id"], index["pad_id"], index["mask_id"]),
        order=order,
    )
