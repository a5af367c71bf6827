"""What the compress stage will take, from its method and the model. Its memory and time are coarse."""

from __future__ import annotations

from collections.abc import Mapping

from models.compression import registry
from models.compression.base import WeightMethod
from models.compression.training_method import TrainedConfig
from pipelines.compression.config import CompressConfig
from pipelines.core.artifact import Artifact
from pipelines.core.estimate import Estimate, EstimateContext, Time

_FLOAT = 4
_DOUBLE = 8
_PROCESS = 800_000_000
"""Python with torch and transformers."""
_SHAPE = ("parameters", "layer_parameters", "layers", "width", "ffn_width")
"""What the base tells of its shape."""
_FIXED_S = 15.0
"""Imports, and reading and writing a small model."""
_RATE = {"cpu": 20e9, "cuda": 50e12}
"""Operations a second, where nothing has been measured."""
_SECONDS_PER_WEIGHT = {"weight": 1e-6, "structure": 1e-6, "kv_cache": 1e-7, "training": 1e-7, "search": 4e-6}
"""What a kind of method does with each weight besides passes over text."""
_SCORED_TOKENS = 1024
"""Tokens of a validation document on which a variant is compared with its baselines."""
_COMPARED = 4
"""The variant, its base and its baselines are scored."""
_WHOLE = 32.0
"""Bits of a weight whose method names no bits."""
_SCALE_BITS = 16.0


def estimate_compress(config: CompressConfig, context: EstimateContext) -> Estimate:
    """Return what making a variant takes; without the parameters of its base nothing is known."""
    parameters = context.fact("parameters")
    if parameters is None:
        return Estimate()
    layers, length, vocabulary = (context.fact(name) for name in ("layer_parameters", "sequence_length", "vocab_size"))
    tokens = _trained_tokens(config, length) + 3 * config.samples * length
    tokens += _COMPARED * config.baseline_documents * _SCORED_TOKENS
    settings = config.parameters
    kind = registry.get(config.method).kind

    def work(parameters: float) -> float:
        """Seconds of this method on the CPU, for a model."""
        return _FIXED_S + 2.0 * parameters * tokens / _RATE["cpu"] + parameters * _SECONDS_PER_WEIGHT[kind]

    def work_of(found: Artifact) -> float | None:
        before = context.number_behind(found, "parameters")
        same = found.manifest.identity["config"].get("method") == config.method
        return work(before) if same and before is not None else None

    flops = 2.0 * parameters * tokens
    stated = Time(
        _FIXED_S + flops / _RATE[context.machine.device] + parameters * _SECONDS_PER_WEIGHT[kind],
        "stated",
        "no earlier run; an assumed rate",
    )
    stored = (
        round(layers * bits_per_weight(config) / 8)
        + (context.fact("model_bytes") * (parameters - layers)) // parameters
    )
    return Estimate(
        ranks=settings.world_size if isinstance(settings, TrainedConfig) else 1,
        memory=memory(config, {name: context.fact(name) for name in _SHAPE}, length, vocabulary),
        time=context.scaled_duration(work(parameters), work_of) or stated,
        flops=flops,
        disk={"model": stored},
        facts={
            **{name: context.fact(name) for name in (*_SHAPE, "dense_bytes", "forward_flops_per_token")},
            "model_bytes": stored,
        },
    )


def memory(config: CompressConfig, shape: Mapping[str, int], length: int, vocabulary: int) -> dict[str, int]:
    """Return the bytes that a compression holds at its peak, by what they are for.

    Args:
        config: of the variant.
        shape: the facts of `_SHAPE` about the base.
        length: tokens of a sequence.
        vocabulary: size of the vocabulary.
    """
    parameters, in_layers, width = (shape[name] for name in ("parameters", "layer_parameters", "width"))
    logits = 2 * _FLOAT * _SCORED_TOKENS * vocabulary if config.baseline_documents else 0
    held = {"process": _PROCESS, "logits": logits}
    method, settings = registry.get(config.method), config.parameters
    if method.kind == "search":  # of what it tries, GPTQ takes most
        method, settings = registry.weight("gptq"), registry.weight("gptq").Config()
    if not isinstance(method, WeightMethod):
        return held | {"weights": _FLOAT * parameters, **_training_bytes(config, parameters)}
    needs, wide = method.needs(settings), max(width, shape["ffn_width"])
    sequences = config.samples * length * (2 if needs.inputs or settings.block_steps else 1)
    tokens = (sequences if needs.sequences else 0) + config.baseline_documents * _SCORED_TOKENS
    return held | {
        "outside of the blocks": _FLOAT * (parameters - in_layers),
        "a block": 2 * _FLOAT * in_layers // shape["layers"],
        "hidden states": _FLOAT * tokens * width,
        "second moments": _DOUBLE * (6 * width**2 + wide**2) if needs.sequences else 0,
        "work on a layer": _DOUBLE * (3 * width * wide + (4 * wide**2 if needs.sequences else 0)),
    }


def bits_per_weight(config: CompressConfig) -> float:
    """Return the bits of a stored weight with its share of a scale; 32 where the method does not say."""
    bits = getattr(config.parameters, "bits", None)
    if not isinstance(bits, int | float):
        return _WHOLE
    group = getattr(config.parameters, "group_size", 0)
    return float(bits) + (_SCALE_BITS / group if isinstance(group, int) and group else 0.0)


def _training_bytes(config: CompressConfig, parameters: int) -> dict[str, int]:
    """Return masters, moments and gradients of a rank, for a method that trains."""
    settings = config.parameters
    if not isinstance(settings, TrainedConfig):
        return {}
    return {"training": _FLOAT * parameters * 4 // (settings.world_size if settings.zero_stage else 1)}


def _trained_tokens(config: CompressConfig, length: int) -> float:
    """Return the tokens of a method's training in forward passes: a training pass is three; baselines train too."""
    settings = config.parameters
    if not isinstance(settings, TrainedConfig):
        return 0.0
    return 3.0 * settings.steps * settings.batch_size * length * (3 if settings.baselines else 1)
