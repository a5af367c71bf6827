"""A coded cache beside its null arms at no fewer stored bits, as bits per byte on validation text.

The text goes through the cache class that generation uses: a pass over a document codes and decodes its keys and values
row by row, as a stream would. Bytes are those that the class holds for a token of that text. GPTQ is no arm here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from models.compression.formats.cache_codes import rounding, rounding_bytes
from models.compression.modules import quantized_cache
from models.compression.modules.quantized_cache import QuantizedCache, Tables
from pipelines.compression import quick_eval
from pipelines.compression.config import CompressConfig
from pipelines.compression.quick_eval import Floats, Yardstick
from pipelines.core.stage import Progress, StageContext
from pipelines.measure import intervals
from pipelines.modelio.load import load_weights

NOT_AN_ARM = {
    "gptq": "rounds a weight matrix against the inputs that it will meet and moves the error to columns not yet "
    "rounded; the rows of a cache are stored as they come, once, and no later row can take their error"
}
"""Methods that other kinds are compared with and this one is not, and why."""
RTN = "rtn"
_GROUPS = (0, 128, 64, 32, 16, 8)


def measure(
    config: CompressConfig,
    source: Path,
    fitted: Mapping[str, Sequence[Tables]],
    prepare: Path,
    context: StageContext,
) -> dict[str, Any]:
    """Return `arms` and `arms_measured` of `compression.json`; no arms where there is no text to measure on.

    Args:
        config: the child's configuration.
        source: the parent's model folder.
        fitted: name -> tables of all layers, the child's under the name of its method; rounding is added here.
        prepare: folder of the prepare artifact.
        context: takes the progress.

    Returns:
        For each arm `ratio` (bits per byte over the parent's), `versus_child` (over the child's), both with intervals
        over the same resamples of documents, and `cache_bytes_per_token`.
    """
    parent = load_weights(source)
    text = _text(config, prepare, parent)
    if text is None:
        return {"arms": {}}
    base = text.nats(parent, "the parent")
    arms = dict(fitted)
    mine = arms.pop(config.method)
    child, size, coded = _measured(config.method, source, mine, text)
    width = parent.config.num_key_value_heads * parent.config.head_dim
    arms = {RTN: nearest_rounding(mine, width, coded)} | arms
    made = {config.method: row(child, base, child, size)}
    _say(context, config.method, made, 1 + len(arms))
    for name, tables in arms.items():
        nats, size, _ = _measured(name, source, tables, text)
        made[name] = row(nats, base, child, size)
        _say(context, name, made, 1 + len(arms))
    measured = {"split": "validation", "documents": text.documents, "scored_tokens": text.scored}
    return {"arms": made, "arms_measured": measured | {"not_arms": NOT_AN_ARM}}


def row(nats: Floats, base: Floats, child: Floats, size: float) -> dict[str, Any]:
    """Return what is kept of one arm."""
    ratio, versus = (intervals.paired_ratio(nats, other, np.ones_like(base)).to_json() for other in (base, child))
    return {"ratio": ratio, "versus_child": versus, "cache_bytes_per_token": size}


def nearest_rounding(child: Sequence[Tables], width: int, coded: float) -> list[Tables]:
    """Return round to nearest per token, on the smallest grid that codes a token in at least so many bytes.

    Args:
        child: tables of all layers; the arm keeps as many tokens exact.
        width: channels of a row.
        coded: bytes of the child's codes for a token, all layers together.
    """
    grids = {
        (size, -bits, group)
        for bits, group in itertools.product(range(2, 9), _GROUPS)
        if (size := rounding_bytes(width, bits, group)) is not None
    }
    large = [grid for grid in grids if 2 * len(child) * grid[0] >= coded]
    _, negative, group = min(large) if large else max(grids)
    quantizer = rounding(-negative, group)
    return [replace(table, keys=quantizer, values=quantizer) for table in child]


def _text(config: CompressConfig, prepare: Path, parent: PreTrainedModel) -> Yardstick | None:
    if not config.arms_documents:
        return None
    return quick_eval.build(prepare, config.arms_documents, parent, "cpu", end="first")


def _measured(name: str, source: Path, tables: Sequence[Tables], text: Yardstick) -> tuple[Floats, float, float]:
    """Return the nats of each document, the cache's bytes for a token, and those of the codes for a coded token."""
    model = quantized_cache.attach(load_weights(source), tables).to(text.device)
    nats = text.nats(model, name)
    ids = torch.from_numpy(text.batches[0].ids).to(text.device)
    with torch.inference_mode():
        cache: QuantizedCache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    coded = len(ids) * max(ids.shape[1] - tables[0].exact_tokens, 1)
    return nats, cache.stored_bytes / ids.numel(), cache.coded_bytes / coded


def _say(context: StageContext, name: str, made: Mapping[str, Mapping[str, Any]], total: int) -> None:
    interval = intervals.Interval(**made[name]["ratio"])
    size = made[name]["cache_bytes_per_token"]
    message = f"{name}: {interval} of the parent's bits per byte with {size:,.1f} bytes of cache a token"
    context.report(Progress(context.node, len(made), total, "arms", message))
