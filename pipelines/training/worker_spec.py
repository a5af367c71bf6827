"""What the stage tells its ranks, as a JSON file, and where each rank puts what it makes.

worker_spec.json        this file
checkpoints/            see `checkpoint.py`
metrics.jsonl           what the stage follows
samples.jsonl           what the model made of a validation text after each validation
profile/                trace of the steps of `pretrain.profile`
losses.jsonl            exact losses of every step, for `training.json`
attempts.jsonl          where each attempt began
rollbacks.json          returns to a checkpoint; none, no file
diagnostics/step-N.json what is known of a step that was not finite
logs/rank-N.log         output of the ranks
model/                  final weights and architecture
training.json           deterministic facts of the finished run
observations.json       its timings
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from models.architectures.config import ArchitectureConfig
from pipelines.training.config import PretrainConfig

PRETRAINING = "pipelines.training.loss_module:pretraining"


class WorkerSpec(BaseModel):
    """One training, the same for every rank; `worker_spec.json` in the scratch folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: PretrainConfig
    index: dict[str, Any]
    """`index.json` of the prepare artifact."""
    data: Path
    """Folder of the prepare artifact."""
    scratch: Path
    """Where the ranks work; it survives a kill."""
    init_weights: Path | None = None
    """Model folder with the weights to start from; None starts from random ones."""
    objective: str = PRETRAINING
    """Import string `module:factory` of an `LossModuleFactory`: what is trained, and by which loss. Training imports no
    method of compression; a method that trains names its own factory here."""
    objective_settings: dict[str, Any] = {}
    """What the factory reads; JSON values."""
    export_precision: Literal["fp32", "bf16"] | None = None
    """How the final weights are stored; None: as trained. A method that packs its weights rounds once: fp32."""
    device: Literal["cpu", "cuda"]

    @property
    def architecture(self) -> ArchitectureConfig:
        """The model that is trained."""
        return self.config.architecture(self.index)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.scratch / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.scratch / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """The file of samples; none where `pretrain.samples` is off."""
        return self.scratch / "samples.jsonl"

    @property
    def profile(self) -> Path:
        """Folder of the trace; none where `pretrain.profile` is none."""
        return self.scratch / "profile"

    @property
    def losses(self) -> Path:
        """The file of exact losses."""
        return self.scratch / "losses.jsonl"

    @property
    def attempts(self) -> Path:
        """One line per start of the ranks: the step that it went on from."""
        return self.scratch / "attempts.jsonl"

    @property
    def rollbacks(self) -> Path:
        """The returns to a checkpoint; see `rollbacks.py`."""
        return self.scratch / "rollbacks.json"

    @property
    def diagnostics(self) -> Path:
        """Folder of what is known of steps that were not finite."""
        return self.scratch / "diagnostics"

    @property
    def logs(self) -> Path:
        """Folder of the ranks' output."""
        return self.scratch / "logs"

    @property
    def model(self) -> Path:
        """Folder of the final weights."""
        return self.scratch / "model"

    @property
    def facts(self) -> Path:
        """The finished run's facts; its existence means that training is over."""
        return self.scratch / "training.json"

    @property
    def observations(self) -> Path:
        """The finished run's timings."""
        return self.scratch / "observations.json"
