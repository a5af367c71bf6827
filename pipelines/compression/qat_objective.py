"""A compression method's part in a training: the student that it trains, and the loss that it trains by.

The student is put together from the initial weights alone, the same way at every start of a rank and once more when
the method packs the result; only parameters travel between the two.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig, Shape
from models.architectures.describe import shape_of
from models.compression import registry
from models.compression.training_method import Step, TrainedConfig, TrainingMethod
from pipelines.compression import sequential
from pipelines.core.artifact import read_json
from pipelines.core.errors import ConfigError
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model
from pipelines.training.loss_module import LossModule, Nats, make_objective, mask_documents
from pipelines.training.worker_spec import WorkerSpec

FACTORY = f"{__name__}:qat_objective"
"""For `WorkerSpec.objective`; `WorkerSpec.objective_settings` is then a `QatSettings`."""

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


class QatSettings(BaseModel):
    """Which method trains, from which weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    parameters: dict[str, Any]
    """Of the method."""
    skip: tuple[str, ...] = ()
    """Patterns of layers that are left alone."""
    base: Path
    """Model folder that the weights come from."""
    teacher: Path | None = None
    """Model folder of the teacher, where the method wants one."""

    @property
    def objective(self) -> TrainingMethod[Any]:
        """The method."""
        return registry.training(self.method)

    @property
    def config(self) -> TrainedConfig:
        """The method's parameters, validated."""
        config: TrainedConfig = self.objective.Config.model_validate(self.parameters)
        return config


class QatLossModule(LossModule):
    """The method's loss while gradients are wanted, the ordinary one in validations.

    Args:
        settings: the method.
        student: what is trained.
        device: where it is trained; every rank holds the whole teacher there.
        seed: of the run.
        nats: the ordinary loss.
    """

    def __init__(self, settings: QatSettings, student: nn.Module, device: torch.device, seed: int, nats: Nats) -> None:
        super().__init__(student, nats=nats)
        self._method, self._config, self._seed = settings.objective, settings.config, seed
        # In a tuple the teacher is no submodule: its weights are neither trained, nor sharded, nor saved.
        self._teacher = () if settings.teacher is None else (_frozen(settings.teacher).to(device),)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the summed nats of the micro batch, float32 scalar."""
        if not torch.is_grad_enabled():
            return super().forward(inputs_BT, targets_BT)
        teacher = self._teacher[0] if self._teacher else None
        step = Step(self.model, teacher, inputs_BT, targets_BT, number=self.step, seed=self._seed)
        return self._method.loss(step, self._config)


def qat_objective(spec: WorkerSpec, device: torch.device) -> LossModule:
    """Return the student of a method with its loss: the factory that `FACTORY` names."""
    settings, seed = QatSettings.model_validate(spec.objective_settings), spec.config.seed
    nats = make_objective(spec.config, spec.architecture).nats
    return QatLossModule(settings, student(settings, spec.architecture, seed), device, seed, nats)


def base_shape(folder: Path) -> Shape:
    """Return the shape of the model in a folder.

    Raises:
        ConfigError: it cannot be trained further.
    """
    try:
        return shape_of(read_json(folder / "config.json"))
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}", hint="use a method of another kind on this model") from error


def student(settings: QatSettings, architecture: ArchitectureConfig, seed: int) -> nn.Module:
    """Return the model to train: initial weights, then the method's own layers.

    Raises:
        ConfigError: the method does not fit the model.
    """
    model = build(architecture, seed=seed)
    if not settings.config.from_scratch:
        copy_base_weights(model, settings)
    try:
        settings.objective.transform(model, sequential.targets(model, settings.skip), settings.config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return model


def copy_base_weights(model: nn.Module, settings: QatSettings) -> None:
    """Copy the base model's weights, layer by layer as the method says.

    Raises:
        ConfigError: a weight of the base model has another shape.
    """
    shape, reader = base_shape(settings.base), WeightReader(settings.base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = _LAYER.sub(lambda m: str(settings.objective.source_layer(int(m[0]), shape, settings.config)), name)
            weight = reader.dense(source)
            if weight.shape != parameter.shape:
                raise ConfigError(
                    f"{settings.method}: {source} of the base model has the shape {list(weight.shape)}, "
                    f"{list(parameter.shape)} is needed"
                )
            parameter.copy_(weight)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Fill a student with the parameters that training has left in `folder`."""
    reader = WeightReader(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.dense(name))


def _frozen(folder: Path) -> nn.Module:
    model = load_model(folder)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))  # packed weights are unpacked by the first pass
    mask_documents(model)
    return model.requires_grad_(requires_grad=False).eval()
