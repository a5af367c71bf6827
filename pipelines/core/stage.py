"""What a stage is: a pure function `(config, inputs, out_dir, context) -> summary`, named and versioned.

Everything else about running it (cache, lease, publication, retries, tracing) is a wrapper; see `run_stage.py`. The
stages themselves are described in `pipelines/stages.py`, without importing them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from pipelines.core import source_closure
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.estimate import Estimate, EstimateContext
from pipelines.core.settings import Settings

Summary = dict[str, Any]

BASES = ("pretrain", "base")
"""What the base model of a run is called, as the node is that makes it: trained here, or brought from elsewhere."""


def base_name(names: Iterable[str]) -> str:
    """Return what the base model is called among names of models or nodes; `pretrain` where there is none yet."""
    return next((name for name in BASES if name in set(names)), BASES[0])


@dataclass(frozen=True)
class Progress:
    """One report of a stage that is at work."""

    node: str
    done: int
    total: int
    unit: str
    """What is counted: steps, documents, layers."""
    message: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics at `done`, for MLflow; empty between measurements."""


class TrackingTarget(BaseModel):
    """The MLflow that a stage writes to, where it does: which server or database, and the run of this node there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str | None = None
    """MLflow tracking URI; None means `$MLFLOW_TRACKING_URI`, else SQLite in the store."""
    experiment: str = "ingot"
    timeout_s: int = 10
    """Limit of one request to a server, in seconds."""
    run_id: str | None = None
    """MLflow's id of the run of this node; None while MLflow has not said."""


@dataclass(frozen=True)
class StageContext:
    """What a stage may use besides its configuration and inputs; nothing here can change a result."""

    node: str
    scratch: Path
    """A folder that survives a kill and is the same for the same fingerprint: checkpoints live here."""
    report: Callable[[Progress], None] = lambda _progress: None
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    tracking: TrackingTarget = field(default_factory=TrackingTarget)
    store: Path = Path(".ingot")
    """Root of the store."""
    project: Path | None = None
    """The user's project, where data.dvc is; None: the one around the working directory."""


class StageFunction(Protocol):
    """The body of a stage."""

    def __call__(  # noqa: D102 - the class documents it
        self, config: Any, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext
    ) -> Summary: ...


@dataclass(frozen=True)
class Stage:
    """A stage by name; its body is imported only when it runs."""

    name: str
    version: int
    """Raised by hand when the code changes results; enters the fingerprint."""
    entry: str
    """`module:function` of the body."""
    observations: tuple[str, ...] = ()
    """Payload files with timings or logs, which are not part of the result."""
    journals: tuple[str, ...] = ()
    """Patterns of files beside a folder `checkpoints` in its scratch, which going on from a checkpoint takes."""
    settings: str = "pipelines.core.settings:Settings"
    """`module:class` of its configuration."""
    corpus: Literal["reads", "descends", "none"] = "descends"
    """reads: its hash is an input of its own; descends: through the other inputs; none: not made of the corpus."""
    needs_tracking: bool = False
    """Whether MLflow has to know what ran before it, as far as MLflow can be reached."""
    estimate: str = ""
    """`module:function` `(config, EstimateContext) -> Estimate`: what it will take; empty where only earlier runs can
    tell."""
    preview: str = ""
    """`module:function` `(inputs) -> rows`: a table that people see before it runs; empty for none."""

    def body(self) -> StageFunction:
        """Import and return the stage function."""
        body: StageFunction = imported(self.entry)
        return body

    def configured(self, table: Mapping[str, Any]) -> Settings:
        """Return the validated configuration of this stage."""
        settings: type[Settings] = imported(self.settings)
        return settings.model_validate(table)

    def estimated(self, config: Settings, context: EstimateContext) -> Estimate:
        """Return what an execution will take; where the stage has no estimator, what the closest earlier one took."""
        found: Estimate = imported(self.estimate)(config, context) if self.estimate else Estimate()
        return found if found.time is not None else replace(found, time=context.closest_duration())

    def preview_rows(self, inputs: Mapping[str, Artifact]) -> list[dict[str, Any]]:
        """Return the table that people see before the stage runs; empty for none."""
        rows: list[dict[str, Any]] = imported(self.preview)(inputs) if self.preview else []
        return rows

    def identity(self, config: Settings, inputs: Mapping[str, str]) -> dict[str, Any]:
        """Return what the fingerprint is taken over; `inputs` maps input names to fingerprints or data hashes."""
        return {"stage": self.name, "version": self.version, "config": config.identity(), "inputs": dict(inputs)}

    def resume_key(self, config: Settings, inputs: Mapping[str, str]) -> dict[str, Any]:
        """Return what an unfinished attempt must share with this one to be gone on from: names the scratch folder."""
        return {**self.identity(config, inputs), "config": config.resume_key()}

    def source_digest(self) -> str:
        """Return the sha256 over all source files that the body can import: warns of a change without a new version."""
        return source_closure.digest(self.entry)


def imported(name: str) -> Any:
    """Return what an import string `module:attribute` names."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)
