"""Can a model from elsewhere be measured and compressed as a recipe asks? Asked by plans; reads no weights.

torch is imported where the model is built, on the meta device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.architectures.describe import shape_of
from models.compression import registry
from pipelines.compression.config import CompressConfig
from pipelines.core.errors import ConfigError, IngotError
from pipelines.data import tokenizer
from pipelines.modelio import folder as folders

_TOKENIZER = "tokenizer.json"


def problems(
    config: Mapping[str, Any], variants: Sequence[CompressConfig], *, folder: Path | None, length: int
) -> Iterator[tuple[str, str]]:
    """Yield what does not fit, each with what to do about it.

    Args:
        config: the model's config.json.
        variants: what is to be made of it.
        folder: its folder, where it lies on this machine.
        length: tokens of the longest sequence that it is shown.
    """
    if folders.family_in(config) is None:
        named = ", ".join(config.get("architectures") or ["none"])
        yield (
            f"config.json names the architecture {named}, which predicts no tokens",
            f"save the model with its language modelling head: {folders.EXPECTED}",
        )
        return
    if config.get("quantization_config") and not (folder and folders.read_record(folder)):
        method = config["quantization_config"].get("quant_method")
        yield f"its weights are quantized already, with {method}", "start from the model before it was quantized"
        return
    if folder is not None and not (folder / _TOKENIZER).is_file():
        yield (
            f"{folder} has no {_TOKENIZER}",
            "save its fast tokenizer beside it: AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        )
        return
    from pipelines.modelio import description, stored_names

    try:
        if folder is not None:
            tokenizer.load(folder, may_grow=False)
        found = description.of_config(config)
        if folder is not None:
            stored_names.mapping(folder)
    except IngotError as error:
        yield error.message, error.hint or "only models that transformers itself has the code of are compressed"
        return
    if found.positions is not None and found.positions < length:
        yield (
            f"it has {found.positions} positions, and sequences have {length} tokens",
            f"prepare.sequence_length={found.positions} evaluate.context={found.positions} or fewer",
        )
    for variant in variants:
        if not variant.from_ and (reason := misfit(variant, config)):
            yield f"compress {variant.name}: {reason}", "leave the variant out, or give it another method"


def misfit(variant: CompressConfig, config: Mapping[str, Any]) -> str:
    """Return why a method does not fit a model, from its config.json; empty where it does."""
    method = registry.get(variant.method)
    kind, model_type = method.kind, str(config.get("model_type"))
    if kind == "kv_cache":
        return _only({"llama"}, variant.method, model_type)
    if kind == "structure":
        return _only({"llama", "modernbert"}, variant.method, model_type)
    if kind == "training":
        try:
            shape_of(config)
        except (ValueError, ConfigError) as error:
            return f"{variant.method} trains, and {error}"
    return ""


def _only(known: Collection[str], method: str, model_type: str) -> str:
    if model_type in known:
        return ""
    return f"{method} knows the layouts {', '.join(sorted(known))}, and this one is {model_type}"
