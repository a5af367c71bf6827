"""The order that the stage gives to its ranks, as a JSON file, and where each rank puts what it makes.

job.json                this file
checkpoints/            see `checkpoint.py`
metrics.jsonl           what the stage follows
losses.jsonl            exact losses of every step, for `training.json`
attempts.jsonl          where each attempt began
rollbacks.json          returns from loss spikes; none, no file
diagnostics/step-N.json what is known of a step that was not finite
logs/rank-N.log         output of the ranks
model/                  final weights and architecture
training.json           deterministic facts of the finished run
observations.json       its timings
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from models.compression import registry
from models.compression.training_method import TrainedConfig
from pipelines.training.config import PretrainConfig


class Program(BaseModel):
    """Which method trains, from which weights."""

    model_config = ConfigDict(frozen=True)

    method: str
    parameters: dict[str, Any]
    """Of the method."""
    skip: tuple[str, ...] = ()
    """Patterns of layers that are left alone."""
    parent: Path
    """Model folder that the weights come from."""
    teacher: Path | None = None
    """Model folder of the teacher, where the method wants one."""

    @property
    def module(self) -> ModuleType:
        """The method."""
        return registry.get(self.method)

    @property
    def config(self) -> TrainedConfig:
        """The method's parameters, validated."""
        config: TrainedConfig = self.module.Config.model_validate(self.parameters)
        return config


class Job(BaseModel):
    """One pretraining, the same for every rank."""

    model_config = ConfigDict(frozen=True)

    config: PretrainConfig
    index: dict[str, Any]
    """`index.json` of the prepare artifact."""
    data: Path
    """Folder of the prepare artifact."""
    work: Path
    """Scratch folder; it survives a kill."""
    start: Path | None = None
    """Model folder with the weights to start from; None starts from random ones."""
    program: Program | None = None
    """The compression method that trains; None for pretraining."""
    device: Literal["cpu", "cuda"]

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.work / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.work / "metrics.jsonl"

    @property
    def losses(self) -> Path:
        """The file of exact losses."""
        return self.work / "losses.jsonl"

    @property
    def attempts(self) -> Path:
        """One line per start of the ranks: the step that it went on from."""
        return self.work / "attempts.jsonl"

    @property
    def rollbacks(self) -> Path:
        """The returns from loss spikes; see `spikes.py`."""
        return self.work / "rollbacks.json"

    @property
    def logs(self) -> Path:
        """Folder of the ranks' output."""
        return self.work / "logs"

    @property
    def model(self) -> Path:
        """Folder of the final weights."""
        return self.work / "model"

    @property
    def facts(self) -> Path:
        """The finished run's facts; its existence means that training is over."""
        return self.work / "training.json"

    @property
    def observations(self) -> Path:
        """The finished run's timings."""
        return self.work / "observations.json"
