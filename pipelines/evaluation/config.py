"""Configuration of the evaluate stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, SerializeAsAny, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from pipelines.core import fingerprint
from pipelines.core.settings import NOT_IDENTITY, PATH, Settings, absolute, start_of, validated_at
from pipelines.evaluation import probe
from pipelines.evaluation.probe import ProbeSettings
from pipelines.measure.config import BatchSettings

TaskName = Literal["next_line", "word_order", "cloze", "addition"]
BaselineName = Literal["gzip", "xz", "order1", "order2", "order3", "unigram"]
DEFAULT_PROBES: dict[str, Any] = {"relative": {}, "latency": {}}
"""Probes that run unless they are switched off; a new file in `probes/` changes no evaluation that does not name it."""


class HarnessTask(Settings):
    """One task of lm-eval: one that comes with it, by name, or a YAML file of one's own."""

    name: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9_.-]*$",
        description="Name of the task; of a file, what results call it. Default: the file's name.",
    )
    file: str = Field(
        default="",
        description="YAML file as lm-eval reads it; its data files are found from its folder, which counts as a whole.",
        json_schema_extra=NOT_IDENTITY | PATH,
    )
    data: str = Field(
        default="",
        description="Folder with the data as SPLIT.jsonl or SPLIT.parquet; empty: what the task names, for a task of "
        "lm-eval usually a download.",
        json_schema_extra=NOT_IDENTITY | PATH,
    )
    fewshot: int | None = Field(default=None, ge=0, description="Examples before each item; none: what the task says.")
    limit: int | None = Field(default=None, ge=2, description="Take this many items, the first ones; none: all.")
    sha256: str = Field(
        default="",
        pattern=r"^([0-9a-f]{64})?$",
        description="Of the file's folder and the data; found when the recipe is read, and checked where it is given.",
    )

    @model_validator(mode="before")
    @classmethod
    def _pinned(cls, table: Any, info: ValidationInfo) -> Any:
        """Name the task, make its paths absolute, and find out what its files hold: bytes are identity, places not."""
        if not isinstance(table, Mapping) or not (table.get("file") or table.get("data") or table.get("name")):
            return table
        found = dict(table)
        for key in ("file", "data"):
            if found.get(key):
                found[key] = absolute(found[key], start_of(info))
        found["name"] = found.get("name") or Path(found["file"] if found.get("file") else "").stem
        places = [Path(found["file"]).parent] if found.get("file") else []
        places += [Path(found["data"])] if found.get("data") else []
        if found.get("file") and not Path(found["file"]).is_file():
            raise ValueError(f"file: {found['file']} is not there")
        actual = _digest(places) if places else ""
        if found.get("sha256") not in {None, "", actual}:
            raise ValueError(f"the files of {found['name']} have sha256 {actual}, expected {found['sha256']}")
        return found | {"sha256": actual}

    @model_validator(mode="after")
    def _names_a_task(self) -> Self:
        if not self.name:
            raise ValueError("a task has a name (one that comes with lm-eval) or a file of its own")
        return self


def _digest(folders: list[Path]) -> str:
    """Return the sha256 over the files that lie directly in each folder."""
    files: dict[str, str] = {}
    for number, folder in enumerate(folders):
        if not folder.is_dir():
            raise ValueError(f"data: {folder} is not a folder")
        files |= {f"{number}/{p.name}": fingerprint.hash_file(p) for p in sorted(folder.iterdir()) if p.is_file()}
    return fingerprint.digest(files)


class TaskConfig(Settings):
    """The lm-eval tasks: some made from the test split, and any others."""

    names: tuple[TaskName, ...] = Field(
        default=("next_line", "cloze", "addition"), description="Tasks to generate and run; empty runs none."
    )
    lm_eval: tuple[HarnessTask, ...] = Field(
        default=(), description="Tasks that come with lm-eval, and YAML files of one's own, one table a task."
    )
    items: int = Field(default=64, ge=2, le=10_000, description="Items per generated task.")
    seed: int = Field(default=0, ge=0, description="Seed of the choice of items.")
    batch_size: int = Field(default=32, ge=1, le=4096, description="Sequences per forward pass in lm-eval.")

    @field_validator("lm_eval")
    @classmethod
    def _own_names(cls, value: tuple[HarnessTask, ...]) -> tuple[HarnessTask, ...]:
        names = [*get_args(TaskName), *(task.name for task in value)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two tasks are called {', '.join(twice)}; give the file a `name` of its own")
        return value


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

    def text_alone(self) -> EvaluateConfig:
        """Return the same measure of held-out text, without tasks, probes and the divergence from the base model."""
        return self.model_copy(
            update={
                "kl_tokens": 0,
                "tasks": TaskConfig(names=()),
                "probes": {
                    name: settings.model_copy(update={"enabled": False}) for name, settings in self.probes.items()
                },
            }
        )

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
