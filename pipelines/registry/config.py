"""The `promote` section of a recipe: which model is put forward, and what it must show. Imports no MLflow, no torch."""

from __future__ import annotations

import re

from pydantic import ConfigDict, Field, field_validator

from pipelines.core.settings import NOT_IDENTITY, PATH, Settings

_REGISTERED = re.compile(r"models:/[^/@:]+(?:@[^/@:]+|/\d+)")


class BaseConfig(Settings):
    """The model that a run starts from, where it does not begin at random weights."""

    model_config = ConfigDict(serialize_by_alias=True)

    from_: str = Field(
        "",
        alias="from",
        description="models:/NAME@champion, models:/NAME/3, an artifact or a model folder; empty: random weights. "
        "With a section `pretrain` it is trained on, without one it is measured and compressed as it is.",
        json_schema_extra=NOT_IDENTITY | PATH,  # the bytes that it leads to stand for it
    )

    @field_validator("from_")
    @classmethod
    def _names_a_model(cls, value: str) -> str:
        if value.startswith("models:") and not _REGISTERED.fullmatch(value):
            raise ValueError("a registered model is models:/NAME@ALIAS or models:/NAME/VERSION")
        return value


class FetchConfig(Settings):
    """The model that a run starts from, as the plan resolved it. Its bytes are identity, its name is not."""

    place: str = Field(
        description="`models:/NAME/VERSION` of a registered model, or a folder.", json_schema_extra=NOT_IDENTITY
    )
    weights: str = Field(pattern=r"^[0-9a-f]{64}$", description="sha256 over its weights, configuration and tokenizer.")
    origin: str = Field(
        "", description="Fingerprint of the artifact that was registered.", json_schema_extra=NOT_IDENTITY
    )


class PromoteConfig(Settings):
    """The gate between an evaluated model and the alias `champion`."""

    enabled: bool = Field(
        True,
        description="Whether the run ends at the gate; false: models are made and measured, and none is registered.",
        json_schema_extra=NOT_IDENTITY,
    )
    model_name: str = Field(
        "ingot",
        min_length=1,
        max_length=200,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Registered model that the candidate becomes a version of.",
    )
    candidate: str = Field(
        "smallest",
        min_length=1,
        description="`pretrain` (`base` where nothing is trained), the name of a variant, or `smallest`: the smallest "
        "variant within budget, or else the base model.",
    )
    confidence: float = Field(0.95, gt=0.5, lt=1.0, description="Confidence of every interval of the gate.")
    min_effect: float = Field(
        0.002,
        ge=0.0,
        le=1.0,
        description="Bits per byte that a candidate must gain on the champion, by the lower end of the interval: a "
        "smaller gain is no improvement even where it is beyond noise, for training with another seed moves as much. A "
        "candidate of fewer bytes becomes champion while it loses no more than this.",
    )
    min_gain_per_doubling: float = Field(
        0.01,
        ge=0.0,
        le=1.0,
        description="Bits per byte that a candidate must gain besides, for each doubling of the champion's bytes.",
    )
    min_documents: int = Field(
        20,
        ge=6,
        description="Held-out documents that a model must be measured on. Of fewer than 6 all can favour one model by "
        "chance more often than once in twenty times, and no interval over them means anything.",
    )
    max_bits_per_byte_ratio: float = Field(
        1.02,
        ge=1.0,
        le=10.0,
        description="A variant's bits per byte over its base's: the upper end of the interval must stay below.",
    )
    max_task_accuracy_drop: float = Field(
        0.05,
        ge=0.0,
        le=1.0,
        description="Accuracy that a variant may lose on any task; only a loss beyond the task's noise counts, and no "
        "task in which guessing explains what the base got right.",
    )
    max_bytes_ratio: float = Field(
        1.0, gt=0.0, le=10.0, description="A variant's bytes on disk over its base's must stay below."
    )
    cache_tokens: int = Field(
        0,
        ge=0,
        description="Tokens whose attention cache counts as part of a model's size (sequences served at once times "
        "their length): the bytes that a variant of a kv_cache method saves are there, not on disk.",
    )
    max_kl_nats: float | None = Field(
        None, gt=0.0, description="Mean KL divergence of a variant from its base, nats a token; None sets no limit."
    )
    max_latency_ratio: float | None = Field(
        None, gt=0.0, description="A variant's decode time over its base's; None sets no limit (timings vary)."
    )
    max_relative_distance: float | None = Field(
        None,
        gt=0.0,
        le=2.0,
        description="How far an encoder's embedding space may be from the champion's: mean absolute difference of "
        "cosines to anchor documents, upper end of the interval; None sets no limit. For users who keep an index of "
        "the champion's embeddings.",
    )
    must_beat: tuple[str, ...] = Field(
        (), description="Baselines (gzip, xz, order1, ...) whose bits per byte the candidate must be below."
    )
    allow_new_test_set: bool = Field(
        False,
        description="Accept a candidate that is not comparable with the champion, without a comparison: other held-out "
        "text, other evaluation settings, or a champion that cannot be measured.",
    )
    register_variants: bool = Field(
        False, description="Register the other variants that are within budget too, without the alias `champion`."
    )

    @property
    def rule(self) -> str:
        """What the gate asks of a candidate that meets a champion, in a sentence: for plans, before anything ran."""
        return (
            f"on {self.min_documents} documents or more, gain {self.min_effect:g} bits per byte on the champion, and "
            f"{self.min_gain_per_doubling:g} more for each doubling of its bytes; a smaller model may lose "
            f"{self.min_effect:g}, a smaller variant of the champion's model what its budgets allow"
        )
