"""A compression method's part in a training: the student that it trains, and the loss that it trains by.

The student is put together from the starting weights alone, the same way at every start of a rank and once more when
the method packs the result; only parameters travel between the two.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig, Shape
from models.architectures.describe import shape_of
from models.compression.training_method import Step
from pipelines.compression import sequential
from pipelines.core.errors import ConfigError
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model
from pipelines.training.objectives import Objective
from pipelines.training.worker_spec import Program

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


class ProgramObjective(Objective):
    """The method's loss while gradients are wanted, the ordinary one in validations.

    Args:
        program: the method.
        student: what is trained.
        device: where it is trained; every rank holds the whole teacher there.
        seed: of the run.
    """

    def __init__(self, program: Program, student: nn.Module, device: torch.device, seed: int) -> None:
        super().__init__(student)
        self._method, self._config, self._seed = program.module, program.config, seed
        # In a tuple the teacher is no submodule: its weights are neither trained, nor sharded, nor saved.
        self._teacher = () if program.teacher is None else (_frozen(program.teacher).to(device),)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the summed nats of the micro batch, float32 scalar."""
        if not torch.is_grad_enabled():
            return super().forward(inputs_BT, targets_BT)
        teacher = self._teacher[0] if self._teacher else None
        step = Step(self.model, teacher, inputs_BT, targets_BT, number=self.step, seed=self._seed)
        loss: Tensor = self._method.loss(step, self._config)
        return loss


def parent_shape(folder: Path) -> Shape:
    """Return the shape of the model in a folder.

    Raises:
        ConfigError: it cannot be trained further.
    """
    try:
        return shape_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}", hint="use a method of another kind on this model") from error


def student(program: Program, architecture: ArchitectureConfig, seed: int) -> nn.Module:
    """Return the model to train: starting weights, then the method's own layers.

    Raises:
        ConfigError: the method does not fit the model.
    """
    model = build(architecture, seed=seed)
    if not program.config.from_scratch:
        inherit(model, program)
    try:
        program.module.transform(model, sequential.targets(model, program.skip), program.config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return model


def inherit(model: nn.Module, program: Program) -> None:
    """Copy the parent's weights, layer by layer as the method says.

    Raises:
        ConfigError: a weight of the parent has another shape.
    """
    shape, reader = parent_shape(program.parent), WeightReader(program.parent)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found = _LAYER.sub(lambda m: str(program.module.source(int(m[0]), shape, program.config)), name)
            weight = reader.dense(found)
            if weight.shape != parameter.shape:
                raise ConfigError(
                    f"{program.method}: {found} of the parent has the shape {list(weight.shape)}, "
                    f"{list(parameter.shape)} is needed"
                )
            parameter.copy_(weight)


def restore(model: nn.Module, folder: Path) -> None:
    """Fill a student with the parameters that training has left in `folder`."""
    reader = WeightReader(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.dense(name))


def _frozen(folder: Path) -> nn.Module:
    model = load_model(folder)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))  # packed weights are unpacked by the first pass
    return model.requires_grad_(requires_grad=False).eval()
