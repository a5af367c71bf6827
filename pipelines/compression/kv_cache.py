"""Methods of kind "kv_cache": the parent's model unchanged, and tables that say how its attention cache is coded.

Calibration records the keys (before RoPE) and values of every layer over training sequences, and the gradients of the
loss with respect to them, so the whole model is held in memory, with the activations of one batch.

The child is compared with its null arms on validation text; see `cache_arms.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from models.compression import registry
from models.compression.cache_method import CacheBaseline, CacheMethod
from models.compression.modules.quantized_cache import Tables, rotate
from pipelines.compression import cache_arms, calibration
from pipelines.compression.config import CompressConfig
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, NumericError
from pipelines.core.stage import Progress, StageContext, Summary
from pipelines.modelio import kv_cache_file
from pipelines.modelio.folder import KV_CACHE_FILE, WeightReader, write_json
from pipelines.modelio.load import load_weights

_ROWS = 16384
"""Tokens that the tables are fitted on; more calibration tokens are thinned evenly."""
_SEQUENCES = 4
"""Sequences whose gradients are computed together."""


@dataclass(frozen=True)
class Seen:
    """What one side of one layer held over the calibration tokens."""

    x_NC: Tensor
    gradient_NC: Tensor
    """Of the summed loss with respect to each entry."""
    positions_N: Tensor
    """Place of each row in its sequence."""

    @property
    def fisher_NC(self) -> Tensor:  # noqa: N802 - a shape letter
        """Squared gradients."""
        return self.gradient_NC.square()

    def rotated(self, model: PreTrainedModel) -> Seen:
        """Return keys after RoPE; their gradients turn with them."""
        heads = model.config.num_key_value_heads

        def turn(rows_NC: Tensor) -> Tensor:
            x_BHTD = rows_NC.unflatten(1, (heads, -1)).transpose(0, 1).unsqueeze(0)
            angles = model.model.rotary_emb(x_BHTD, self.positions_N.unsqueeze(0))
            return rotate(x_BHTD, angles)[0].transpose(0, 1).flatten(1)

        return replace(self, x_NC=turn(self.x_NC), gradient_NC=turn(self.gradient_NC))


def run(config: CompressConfig, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> Summary:
    """Fit the cache tables of `inputs["model"]` on training sequences of `inputs["prepare"]`.

    Writes `model/` (the parent's files and `kv_cache.safetensors`) and `compression.json`.

    Raises:
        ConfigError: the model has no cache that this can code.
        NumericError: keys, values or their gradients are not finite.
    """
    method, source, target = registry.kv_cache(config.method), inputs["model"].path / "model", out_dir / "model"
    model = load_weights(source)
    check(config.method, model)
    tokens_NT = calibration.sample_tokens(
        inputs["prepare"].path, samples=config.samples, seed=config.seed, masked=False
    )
    parameters: Any = config.parameters
    seen = record(model, tokens_NT, parameters.exact_tokens)
    arms = {config.method: CacheBaseline(parameters), **method.baselines(parameters)}
    fitted: dict[str, list[Tables]] = {name: [] for name in arms}
    rows: dict[str, dict[str, Any]] = {}
    for number, (keys, values) in enumerate(seen):
        errors: dict[str, Any] = {}
        for name, chosen in arms.items():
            coded = keys.rotated(model) if chosen.after_rope else keys
            table = replace(_fit(method, coded, values, chosen.config), rotated=chosen.after_rope)
            fitted[name].append(table)
            errors[name] = _errors(table, coded, values)
        rows[f"layers.{number}"] = errors.pop(config.method) | {"null": errors}
        context.report(Progress(context.node, number + 1, len(seen), "layers"))
    made = fitted[config.method]
    _copy(source, target)
    kv_cache_file.write(target, made, config.method, parameters)
    report = {
        "method": config.method,
        "parameters": parameters.model_dump(mode="json"),
        "layout": "the parent's weights, ingot cache tables",
        "loads_with": "pipelines.modelio.load",
        "calibration": {"sequences": len(tokens_NT), "seed": config.seed},
        "not_informative": "",
        "totals": _totals(inputs["model"], target, made, seen),
        "errors": _means(rows),
        "layers": rows,
    }
    report |= cache_arms.measure(config, source, fitted, inputs["prepare"].path, context)
    write_json(out_dir / "compression.json", report)
    return {key: report[key] for key in ("method", "parameters", "layout", "totals", "errors", "arms")}


def check(method: str, model: PreTrainedModel) -> None:
    """Refuse what has no cache to code.

    Raises:
        ConfigError: naming method and model.
    """
    if type(model) is not LlamaForCausalLM:
        raise ConfigError(
            f"{method} codes the key-value cache of a decoder in the Llama layout; {type(model).__name__} has none",
            hint="leave it out for this family",
        )


def record(model: PreTrainedModel, tokens_NT: NDArray[np.int64], skip: int) -> list[tuple[Seen, Seen]]:
    """Return keys before RoPE and values of every layer, and their gradients.

    Args:
        model: a Llama decoder.
        tokens_NT: calibration sequences.
        skip: tokens at the start of each sequence to leave out, because they are kept exactly.

    Raises:
        NumericError: something is not finite.
    """
    layers = model.model.layers
    places = [module for layer in layers for module in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    thin = -(-tokens_NT.size // _ROWS)
    states: list[list[Tensor]] = [[] for _ in places]
    gradients: list[list[Tensor]] = [[] for _ in places]
    positions: list[Tensor] = []
    model.requires_grad_(False)
    for outputs in _passes(model, places, tokens_NT):
        for place, output in enumerate(outputs):
            assert output.grad is not None
            for held, tensor in ((states, output.detach()), (gradients, output.grad)):
                held[place].append(tensor[:, skip:].flatten(0, 1)[::thin].cpu())
        places_BT = torch.arange(skip, tokens_NT.shape[1]).expand(len(outputs[0]), -1)
        positions.append(places_BT.flatten()[::thin])
    places_N = torch.cat(positions)
    found = [Seen(torch.cat(x).float(), torch.cat(g).float(), places_N) for x, g in zip(states, gradients, strict=True)]
    if not all(bool(torch.isfinite(seen.x_NC.sum() + seen.fisher_NC.sum())) for seen in found):
        raise NumericError("calibration met keys, values or gradients that are not finite")
    return list(zip(found[::2], found[1::2], strict=True))


def _passes(
    model: PreTrainedModel, places: Sequence[nn.Module], tokens_NT: NDArray[np.int64]
) -> Iterator[list[Tensor]]:
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
            for start in range(0, len(tokens_NT), _SEQUENCES):
                outputs.clear()
                ids = torch.from_numpy(tokens_NT[start : start + _SEQUENCES]).to(model.device)
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
                nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
                yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _fit(method: CacheMethod[Any], keys: Seen, values: Seen, config: Any) -> Tables:
    try:
        fitted = method.fit_keys(keys.x_NC, keys.fisher_NC, config)
        return Tables(fitted, method.fit_values(values.x_NC, values.fisher_NC, config), config.exact_tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _errors(table: Tables, keys: Seen, values: Seen) -> dict[str, float]:
    """Return the relative errors of one layer, weighted by squared gradients."""
    pairs = {"keys": (table.keys, keys), "values": (table.values, values)}
    return {side: _relative(q.decode(q.encode(s.x_NC)), s) for side, (q, s) in pairs.items()}


def _relative(decoded_NC: Tensor, seen: Seen) -> float:
    weight = seen.fisher_NC.double()
    error = (decoded_NC.double() - seen.x_NC.double()).square()
    return float((weight * error).sum() / (weight * seen.x_NC.double().square()).sum().clamp(min=1e-300))


def _means(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    def mean(pick: Any) -> dict[str, float]:
        return {side: float(np.mean([pick(row)[side] for row in rows.values()])) for side in ("keys", "values")}

    names = next(iter(rows.values()))["null"]
    arms = {arm: mean(lambda row, arm=arm: row["null"][arm]) for arm in names}
    return mean(lambda row: row) | {"null": arms}


def _totals(
    parent: Artifact, target: Path, made: Sequence[Tables], seen: Sequence[tuple[Seen, Seen]]
) -> dict[str, Any]:
    """Return bytes: of all weight files, of the tables, and of the cache for each token."""
    reader = WeightReader(target)
    coded = sum(
        table.keys.encode(keys.x_NC).bytes + table.values.encode(values.x_NC).bytes
        for table, (keys, values) in zip(made, seen, strict=True)
    )
    numbers = sum(keys.x_NC.numel() + values.x_NC.numel() for keys, values in seen)
    held = "compression.json" in parent.manifest.files
    per_weight = parent.read_json("compression.json")["totals"]["bits_per_weight"] if held else None
    table_bytes = (target / KV_CACHE_FILE).stat().st_size
    return {
        "layers": len(made),
        "bits_per_weight": per_weight,
        "bits_per_cached_number": 8 * coded / numbers,
        "table_bytes": table_bytes,
        "bytes": reader.bytes + table_bytes,
        "parent_bytes": reader.bytes,
        "ratio": reader.bytes / (reader.bytes + table_bytes),
    }


def _copy(source: Path, target: Path) -> None:
    """Take over the parent's files without copying bytes where the file system allows it; nobody writes to them."""
    target.mkdir(parents=True)
    for path in sorted(path for path in source.iterdir() if path.is_file()):
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copyfile(path, target / path.name)
