"""Methods of kind "kv_cache": the base model unchanged, and tables that say how its attention cache is quantized.

Calibration records the keys (before RoPE) and values of every layer over training sequences, and the gradients of the
loss with respect to them, so the whole model is held in memory, with the activations of one batch. The rows of all
layers wait in host memory; those of one layer at a time are on the device.

The variant is compared with baselines at no fewer stored bits, on text that goes through the cache class of generation:
a pass over a document quantizes its keys and values row by row, as a stream would. Bytes are those that the class holds
for a token of that text.

Shapes: N rows (tokens of all documents), C channels (all key heads side by side), H heads, T tokens, D head size.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from models.architectures.config import IGNORED
from models.compression import registry
from models.compression.cache_method import CacheBaseline, CacheConfig, CacheMethod
from models.compression.formats.cache_codes import rounding, rounding_bytes
from models.compression.modules import quantized_cache
from models.compression.modules.quantized_cache import QuantizedCache, Tables, rotate
from pipelines.compression import baselines, calibration
from pipelines.compression.baselines import Contender
from pipelines.compression.calibration import Batch
from pipelines.compression.quick_eval import QuickEval
from pipelines.compression.report import (
    FILE,
    CachedLayer,
    CacheErrors,
    CalibrationFacts,
    Comparison,
    CompressionReport,
    Totals,
)
from pipelines.compression.run import CompressionRun
from pipelines.core.errors import ConfigError, NumericError
from pipelines.modelio import kv_cache_file
from pipelines.modelio.folder import KV_CACHE_FILE

LAYOUT = "weights of the base, ingot cache tables"
LEFT_OUT = {
    "gptq": "rounds a weight matrix against the inputs that it will meet and moves the error to columns not yet "
    "rounded; the rows of a cache are stored as they come, once, and no later row can take their error"
}
"""Methods that other kinds are compared with and this one is not, and why."""
_ROWS = 16384
"""Tokens that the tables are fitted on; more calibration tokens are thinned evenly."""
_SEQUENCES = 4
"""Gradients are computed of about as many tokens together as so many sequences have."""
_GROUPS = (0, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Recorded:
    """What one side (keys or values) of one layer was over the calibration tokens."""

    x_NC: Tensor
    gradient_NC: Tensor
    """Of the summed loss with respect to each entry."""
    positions_N: Tensor
    """Place of each row in its document."""

    @property
    def fisher_NC(self) -> Tensor:  # noqa: N802 - a shape letter
        """Squared gradients."""
        return self.gradient_NC.square()

    def to(self, device: torch.device) -> Recorded:
        """Return the same on another device."""
        return Recorded(self.x_NC.to(device), self.gradient_NC.to(device), self.positions_N.to(device))

    def rotated(self, model: LlamaForCausalLM) -> Recorded:
        """Return keys after RoPE; their gradients turn with them."""
        heads = model.config.num_key_value_heads

        def turn(rows_NC: Tensor) -> Tensor:
            x_BHTD = rows_NC.unflatten(1, (heads, -1)).transpose(0, 1).unsqueeze(0)
            angles = model.model.rotary_emb(x_BHTD, self.positions_N.unsqueeze(0))
            return rotate(x_BHTD, angles)[0].transpose(0, 1).flatten(1)

        return replace(self, x_NC=turn(self.x_NC), gradient_NC=turn(self.gradient_NC))


def compress(run: CompressionRun) -> CompressionReport:
    """Fit the cache tables of the base model on training sequences.

    Writes the base's files and `kv_cache.safetensors`.

    Raises:
        ConfigError: the model has no cache that this can quantize.
        NumericError: keys, values or their gradients are not finite.
    """
    config, method, parameters = run.config, registry.kv_cache(run.config.method), run.config.parameters
    assert isinstance(parameters, CacheConfig)
    model = run.load_base()
    check(config.method, model)
    recorded = record(model, _text(run), parameters.exact_tokens)
    ways = {config.method: CacheBaseline(parameters), **method.baselines(parameters)}
    tables: dict[str, list[Tables]] = {name: [] for name in ways}
    rows: dict[str, CachedLayer] = {}
    stored_bytes = 0
    for number, sides in enumerate(recorded):
        keys, values = (side.to(run.device) for side in sides)
        errors: dict[str, CacheErrors] = {}
        for name, way in ways.items():
            fitted_on = keys.rotated(model) if way.after_rope else keys
            table = fit(method, fitted_on, values, way)
            tables[name].append(table)
            errors[name] = _errors(table, fitted_on, values)
        own = tables[config.method][-1]
        stored_bytes += own.keys.encode(keys.x_NC).bytes + own.values.encode(values.x_NC).bytes
        mine = errors.pop(config.method)
        rows[f"layers.{number}"] = CachedLayer(keys=mine.keys, values=mine.values, baselines=errors)
        run.progress(number + 1, len(recorded), "layers")
    numbers = sum(keys.x_NC.numel() + values.x_NC.numel() for keys, values in recorded)
    _copy(run.source, run.target)
    kv_cache_file.write(run.target, tables[config.method], config.method, parameters)
    return CompressionReport(
        method=config.method,
        parameters=parameters.model_dump(mode="json"),
        layout=LAYOUT,
        loads_with="pipelines.modelio.load",
        not_informative=method.not_informative,
        calibration=CalibrationFacts(sequences=len(run.tokens_NT), seed=config.seed),
        totals=_totals(run, len(rows), 8 * stored_bytes / numbers),
        errors=_means(list(rows.values())),
        layers=rows,
        comparison=_compare(run, model, tables),
    )


def check(method: str, model: PreTrainedModel) -> None:
    """Refuse what has no cache to quantize.

    Raises:
        ConfigError: naming method and model.
    """
    if type(model) is not LlamaForCausalLM:
        raise ConfigError(
            f"{method} quantizes the key-value cache of a decoder in the Llama layout; {type(model).__name__} has none",
            hint="leave it out for this family",
        )


# ---- calibration ------------------------------------------------------------------------------------------------


def _text(run: CompressionRun) -> list[Batch]:
    return calibration.batches(run.prepare, run.tokens_NT, run.labels_NT, sequences=_SEQUENCES)


def record(model: PreTrainedModel, text: Sequence[Batch], skip: int) -> list[tuple[Recorded, Recorded]]:
    """Return keys before RoPE and values of every layer, and their gradients, in host memory.

    Args:
        model: a Llama decoder.
        text: calibration documents.
        skip: tokens at the start of each document to leave out, because they are kept exactly.

    Raises:
        NumericError: something is not finite.
    """
    layers = model.model.layers
    places = [module for layer in layers for module in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    thin, met = -(-sum(batch.tokens_BL.size for batch in text) // _ROWS), 0
    states: list[list[Tensor]] = [[] for _ in places]
    gradients: list[list[Tensor]] = [[] for _ in places]
    positions: list[Tensor] = []
    model.requires_grad_(False)
    for outputs in _passes(model, places, text):
        places_BL = torch.arange(outputs[0].shape[1])[skip:].expand(len(outputs[0]), -1)
        rows = slice(-met % thin, None, thin)
        met += places_BL.numel()
        for place, output in enumerate(outputs):
            assert output.grad is not None
            for kept, tensor in ((states, output.detach()), (gradients, output.grad)):
                kept[place].append(tensor[:, skip:].flatten(0, 1)[rows].cpu())
        positions.append(places_BL.flatten()[rows])
    positions_N = torch.cat(positions)
    sides = [
        Recorded(torch.cat(x).float(), torch.cat(g).float(), positions_N)
        for x, g in zip(states, gradients, strict=True)
    ]
    if not all(bool(torch.isfinite(side.x_NC.sum() + side.fisher_NC.sum())) for side in sides):
        raise NumericError("calibration met keys, values or gradients that are not finite")
    return list(zip(sides[::2], sides[1::2], strict=True))


def _passes(model: PreTrainedModel, places: Sequence[nn.Module], text: Sequence[Batch]) -> Iterator[list[Tensor]]:
    """Run batches forward and backward; yield what the modules in `places` put out, gradients included."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        output.retain_grad()
        outputs.append(output)

    hooks = [module.register_forward_hook(keep) for module in places]
    try:
        with torch.enable_grad():
            for batch in text:
                outputs.clear()
                ids, labels = (torch.from_numpy(part).to(model.device) for part in (batch.tokens_BL, batch.labels_BL))
                logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
                loss = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
                loss.backward()
                yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def fit(method: CacheMethod[Any], keys: Recorded, values: Recorded, way: CacheBaseline[Any]) -> Tables:
    """Return the tables of one layer, on the device of what was recorded.

    Raises:
        ConfigError: channels do not fill whole bytes.
    """
    device = keys.x_NC.device
    try:
        fitted = method.fit_keys(keys.x_NC, keys.fisher_NC, way.config).to(device)
        others = method.fit_values(values.x_NC, values.fisher_NC, way.config).to(device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Tables(fitted, others, way.config.exact_tokens, rotated=way.after_rope)


def _errors(table: Tables, keys: Recorded, values: Recorded) -> CacheErrors:
    """Return the relative errors of one layer, weighted by squared gradients."""
    pairs = {"keys": (table.keys, keys), "values": (table.values, values)}
    return CacheErrors(**{side: _relative(q.decode(q.encode(r.x_NC)), r) for side, (q, r) in pairs.items()})


def _relative(decoded_NC: Tensor, recorded: Recorded) -> float:
    weight = recorded.fisher_NC.double()
    error = (decoded_NC.double() - recorded.x_NC.double()).square()
    return float((weight * error).sum() / (weight * recorded.x_NC.double().square()).sum().clamp(min=1e-300))


def _means(rows: Sequence[CachedLayer]) -> CachedLayer:
    """Return the means over layers."""

    def mean(errors: Sequence[CacheErrors]) -> dict[str, float]:
        return {"keys": fmean(e.keys for e in errors), "values": fmean(e.values for e in errors)}

    others = {name: CacheErrors(**mean([row.baselines[name] for row in rows])) for name in rows[0].baselines}
    return CachedLayer(**mean(rows), baselines=others)


def _totals(run: CompressionRun, layers: int, bits: float) -> Totals:
    """Return bytes of all weight files and of the tables; `bits` are those of a cached number."""
    table_bytes, weights = (run.target / KV_CACHE_FILE).stat().st_size, run.reader.bytes
    base = run.inputs["model"]
    compressed = FILE in base.manifest.files
    return Totals(
        layers=layers,
        bits_per_weight=CompressionReport.read(base.path).totals.bits_per_weight if compressed else None,
        model_bits_per_weight=8 * (weights + table_bytes) / run.base_weights,
        bits_per_cached_number=bits,
        table_bytes=table_bytes,
        bytes=weights + table_bytes,
        base_bytes=weights,
        ratio=weights / (weights + table_bytes),
    )


def _copy(source: Path, target: Path) -> None:
    """Take over the base's files without copying bytes where the file system allows it; nobody writes to them."""
    target.mkdir(parents=True)
    for path in sorted(path for path in source.iterdir() if path.is_file()):
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copyfile(path, target / path.name)


# ---- the variant beside its baselines ---------------------------------------------------------------------------


def _compare(run: CompressionRun, base: PreTrainedModel, tables: Mapping[str, Sequence[Tables]]) -> Comparison | None:
    """Compare the variant with round to nearest and the method's own baselines; None where there is no text."""
    documents = run.config.baseline_documents
    text = run.quick_eval(documents, "first") if documents else None
    if text is None:
        return None
    own, *others = tables

    def contenders() -> Iterator[Contender]:
        yield Contender("the base", text.nats(base, "the base"))
        model = quantized_cache.attach(run.load_base(), tables[own])
        kept, quantized = cache_bytes(model, text, tables[own][0].exact_tokens)
        yield Contender(own, text.nats(model, own), cache_bytes_per_token=kept)
        width = base.config.num_key_value_heads * base.config.head_dim
        rounded = nearest_rounding(tables[own], width, quantized)
        for name, table in {"rtn": rounded, **{name: tables[name] for name in others}}.items():
            model = quantized_cache.attach(run.load_base(), table)
            kept, _ = cache_bytes(model, text, table[0].exact_tokens)
            yield Contender(name, text.nats(model, name), cache_bytes_per_token=kept)

    return baselines.compare(run, text, contenders(), count=2 + len(others), left_out=LEFT_OUT)


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, text: QuickEval, exact_tokens: int) -> tuple[float, float]:
    """Return the bytes that a cache holds for a token, and those of the codes for a quantized token."""
    ids_BT = torch.from_numpy(text.batches[0].ids).to(text.device)
    cache: QuantizedCache = model(input_ids=ids_BT, use_cache=True, logits_to_keep=1).past_key_values
    quantized = len(ids_BT) * max(ids_BT.shape[1] - exact_tokens, 1)
    return cache.stored_bytes / ids_BT.numel(), cache.coded_bytes / quantized


def nearest_rounding(tables: Sequence[Tables], width: int, quantized: float) -> list[Tables]:
    """Return round to nearest per token, on the smallest grid that stores a token in at least so many bytes.

    Args:
        tables: those of the variant, for all layers; as many tokens are kept exact.
        width: channels of a row.
        quantized: bytes of the variant's codes for a token, all layers together.
    """
    grids = {
        (size, -bits, group)
        for bits, group in itertools.product(range(2, 9), _GROUPS)
        if (size := rounding_bytes(width, bits, group)) is not None
    }
    large = [grid for grid in grids if 2 * len(tables) * grid[0] >= quantized]
    _, negative, group = min(large) if large else max(grids)
    quantizer = rounding(-negative, group)
    return [replace(table, keys=quantizer, values=quantizer, rotated=False) for table in tables]
