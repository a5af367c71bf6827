"""Configuration of the evaluate stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, ValidationError, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from pipelines.core.settings import Settings, validated_at
from pipelines.evaluation import probe
from pipelines.evaluation.probe import ProbeSettings
from pipelines.measure.config import BatchSettings

TaskName = Literal["next_line", "cloze", "addition"]
BaselineName = Literal["gzip", "xz", "order1", "order2", "order3", "unigram"]
DEFAULT_PROBES: dict[str, Any] = {"relative": {}, "latency": {}}
"""Probes that run unless they are switched off; a new file in `probes/` changes no evaluation that does not name it."""


class TaskConfig(Settings):
    """The local lm-eval tasks made from the test split."""

    names: tuple[TaskName, ...] = Field(
        default=("next_line", "cloze", "addition"), description="Tasks to generate and run; empty runs none."
    )
    items: int = Field(default=64, ge=2, le=10_000, description="Items per task.")
    seed: int = Field(default=0, ge=0, description="Seed of the choice of items.")
    batch_size: int = Field(default=32, ge=1, le=4096, description="Sequences per forward pass in lm-eval.")


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
    probes: dict[str, SerializeAsAny[ProbeSettings]] = Field(
        default_factory=dict,
        description="What else is measured, one table a probe: `relative` (embedding spaces of encoders) and `latency` "
        "unless their `enabled` is false, and every other probe that is named here, as `samples` (texts at fixed "
        "prompts).",
    )

    @property
    def measures_time(self) -> bool:
        """Whether the stage measures time, which other work would disturb."""
        return any(settings.enabled and probe.get(name).observes for name, settings in self.probes.items())

    @field_validator("probes", mode="before")
    @classmethod
    def _settings_of_probes(cls, tables: Any) -> Any:
        """Give every table to the settings of its probe; a table of errors keeps the whole path of each."""
        if not isinstance(tables, Mapping):
            return tables
        return {name: _probe_settings(name, table) for name, table in (DEFAULT_PROBES | dict(tables)).items()}

    def identity(self) -> dict[str, Any]:
        """Return the fields that can change a result: of the probes, those that run and give one."""
        return super().identity() | {"probes": self._identity_of_probes()}

    def resume_key(self) -> dict[str, Any]:
        """Return the identity without elastic fields."""
        return super().resume_key() | {"probes": self._identity_of_probes()}

    def _identity_of_probes(self) -> dict[str, Any]:
        chosen = {n: settings for n, settings in self.probes.items() if settings.enabled and not probe.get(n).observes}
        return {name: settings.identity() for name, settings in chosen.items()}


def _probe_settings(name: str, table: Any) -> ProbeSettings:
    try:
        known = probe.get(name)
    except ValueError as error:
        detail = PydanticCustomError("probe", "{reason}", {"reason": str(error)})
        raise ValidationError.from_exception_data(
            "EvaluateConfig", [InitErrorDetails(type=detail, loc=(name,), input=table)]
        ) from None
    settings: ProbeSettings = validated_at(known.Settings, table, name)
    return settings
