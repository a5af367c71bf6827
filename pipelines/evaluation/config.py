"""Configuration of the evaluate stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.core.settings import NOT_IDENTITY, Settings
from pipelines.measure.config import BatchSettings

TaskName = Literal["next_line", "cloze", "addition"]
BaselineName = Literal["gzip", "xz", "order1", "order2", "order3", "unigram"]


class TaskConfig(Settings):
    """The local lm-eval tasks made from the test split."""

    names: tuple[TaskName, ...] = Field(
        default=("next_line", "cloze", "addition"), description="Tasks to generate and run; empty runs none."
    )
    items: int = Field(default=64, ge=2, le=10_000, description="Items per task.")
    seed: int = Field(default=0, ge=0, description="Seed of the choice of items.")
    batch_size: int = Field(default=32, ge=1, le=4096, description="Sequences per forward pass in lm-eval.")


class LatencyConfig(Settings):
    """The probe of latency and memory, run in a process of its own; it measures and never changes a result."""

    enabled: bool = Field(default=True, description="Measure latency and peak memory.")
    prompt_tokens: int = Field(default=128, ge=2, le=1 << 20, description="Tokens of the prompt (prefill).")
    new_tokens: int = Field(default=16, ge=1, le=1 << 16, description="Tokens generated one by one (decode).")
    repeats: int = Field(default=5, ge=1, le=1000, description="Repeats; the median is reported.")
    timeout_s: float = Field(default=300.0, gt=0, description="Seconds after which the probe is given up.")


class EvaluateConfig(BatchSettings):
    """How a model is measured on the held-out documents."""

    max_documents: int | None = Field(
        default=None,
        ge=2,
        description="Score this many of the test documents, chosen by hash; the result is marked as truncated. "
        "Default: all.",
    )
    bootstrap_samples: int = Field(default=2000, ge=100, le=1_000_000, description="Bootstrap resamples of documents.")
    bootstrap_seed: int = Field(default=0, ge=0, description="Seed of the bootstrap.")
    confidence: float = Field(default=0.95, ge=0.5, le=0.999, description="Coverage of all intervals.")
    baselines: tuple[BaselineName, ...] = Field(
        default=("gzip", "xz", "order1", "order2", "order3", "unigram"),
        description="Baselines measured beside a base model: two compressors and token counts with Witten-Bell backoff "
        "for a decoder, unigram for an encoder.",
    )
    baseline_tokens: int = Field(
        default=20_000_000, ge=1000, description="Train tokens that the count models read at most."
    )
    kl_tokens: int = Field(
        default=8192, ge=0, description="Tokens on which a variant's predictions are compared with its base model's."
    )
    tasks: TaskConfig = Field(default_factory=TaskConfig, description="lm-eval tasks.")
    latency: LatencyConfig = Field(
        default_factory=LatencyConfig,
        description="Probe of latency and memory.",
        json_schema_extra=NOT_IDENTITY,
    )

    @property
    def measures_time(self) -> bool:
        """Whether the stage measures latency, which other work would disturb."""
        return self.latency.enabled
