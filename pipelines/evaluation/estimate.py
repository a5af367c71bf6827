"""What the evaluate stage will take, from the held-out tokens and the model. Its memory and time are coarse."""

from __future__ import annotations

from pipelines.core.artifact import Artifact
from pipelines.core.estimate import Estimate, EstimateContext, Time
from pipelines.evaluation.config import EvaluateConfig

_FLOAT = 4
_PROCESS = 1_000_000_000
"""Python with torch, transformers and lm-eval."""
_LOGITS_HELD = 3
"""Logits, their log-softmax, and one more while tasks are scored."""
_FIXED_S = 20.0
"""Imports, baselines, intervals and probes of a small model."""
_RATE = {"cpu": 20e9, "cuda": 50e12}
"""Operations a second of forward passes, where nothing has been measured."""
_NAMED_ITEMS = 2000
"""Items of a task of lm-eval without a limit, of which some have hundreds and some ten thousand."""
_ITEM_TOKENS = 64
"""Tokens of an item of a task with its choices, about."""
_RESULTS = 4_000_000
"""Bytes of the numbers, tasks and outcomes."""


def estimate_evaluate(config: EvaluateConfig, context: EstimateContext) -> Estimate:
    """Return what evaluating takes; without tokens and parameters of its inputs nothing is known."""
    parameters, tokens = context.fact("parameters"), context.fact("test_tokens")
    if parameters is None or tokens is None:
        return Estimate()
    documents = context.fact("test_documents")
    share = min(1.0, config.max_documents / documents) if config.max_documents and documents else 1.0
    length = config.context or context.fact("sequence_length")
    overlap = length / (config.stride or 0.75 * length)
    items = [config.tasks.items] * len(config.tasks.names) + [
        task.limit or _NAMED_ITEMS for task in config.tasks.lm_eval
    ]
    asked = sum(items) * _ITEM_TOKENS + config.kl_tokens

    def work(parameters: float, tokens: float) -> float:
        """Seconds of an evaluation laid out like this one on the CPU, of a model on so many tokens."""
        return _FIXED_S + (tokens * overlap + asked) * 2.0 * parameters / _RATE["cpu"]

    def work_of(found: Artifact) -> float | None:
        names = ("parameters", "test_tokens", "test_documents", "documents")
        numbers = [number for name in names if (number := context.number_behind(found, name)) is not None]
        if len(numbers) < len(names):
            return None
        parameters, tokens, documents, scored = numbers
        return work(parameters, tokens * scored / documents)

    flops = (tokens * share * overlap + asked) * context.fact("forward_flops_per_token", 2.0 * parameters)
    peak, device = context.machine.peak_flops, context.machine.device
    stated = Time(
        _FIXED_S + flops / (_RATE[device] if peak is None else peak / 2), "stated", "no earlier run; an assumed rate"
    )
    return Estimate(
        memory={
            "process": _PROCESS,
            "weights": context.fact("dense_bytes"),
            "logits": _LOGITS_HELD * _FLOAT * config.batch_tokens * context.fact("vocab_size"),
        },
        time=context.scaled_duration(work(parameters, tokens * share), work_of) or stated,
        flops=flops,
        disk={"results": _RESULTS},
    )
