"""The module that an engine trains: a model together with its loss.

Legend: B sequences of a micro batch, T tokens of a sequence.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.architectures import documents, predict
from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from models.architectures.recompute import checkpoint_activations
from models.objectives import registry
from models.objectives.base import Objective, ObjectiveContext
from pipelines.training import init_weights
from pipelines.training.config import PretrainConfig
from pipelines.training.worker_spec import WorkerSpec

Nats = Callable[[nn.Module, Tensor, Tensor, int | None], Tensor]
"""(model, inputs [B, T], targets [B, T], chunk) -> summed nats."""
Question = Callable[[nn.Module, Tensor], Tensor]
"""(model, inputs [B, T]) -> whatever is asked of it."""


class LossModule(nn.Module):
    """A transformers model with its loss: what the engine wraps.

    Args:
        model: a decoder or an encoder with its output layer.
        loss_chunk: see `models.architectures.predict.language_nats`.
        nats: the loss; an objective's `nats`.
        document_mask: keep the documents of a packed sequence apart.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_chunk: int | None = None,
        nats: Nats = predict.language_nats,
        *,
        document_mask: bool = True,
    ) -> None:
        super().__init__()
        if document_mask:
            mask_documents(model)
        self.model = model
        self.loss_chunk = loss_chunk
        self.nats = nats
        self.step = 0
        """Steps done when the current one began; the trainer sets it."""
        self._question: Question | None = None

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the summed nats of the micro batch, float32 scalar; inside `asked` what the question gives."""
        if self._question is not None:
            return self._question(self.model, inputs_BT)
        return self.nats(self.model, inputs_BT, targets_BT, self.loss_chunk)

    @contextlib.contextmanager
    def asked(self, question: Question) -> Iterator[None]:
        """Let a forward pass answer a question inside the block: an engine knows no other way to its model."""
        self._question = question
        try:
            yield
        finally:
            self._question = None

    def compile_model(self) -> None:
        """Compile everything up to the logits at its first use; parameters keep their names."""
        cast("Any", self.model).model.compile()


def mask_documents(model: nn.Module) -> None:
    """Keep the documents of packed sequences apart, by the special tokens that the model's configuration names."""
    config = cast("Any", model).config
    documents.keep_apart(model, bos_id=config.bos_token_id, pad_id=config.pad_token_id)


def make_objective(config: PretrainConfig, architecture: ArchitectureConfig, phase: int | None = None) -> Objective:
    """Return what the model is asked to predict, in a phase or with the run's settings, as in validation."""
    objective = registry.get(config.objective)
    context = ObjectiveContext(
        seed=config.seed,
        vocab_size=architecture.vocab_size,
        bos_id=architecture.bos_id,
        eos_id=architecture.eos_id,
        pad_id=architecture.pad_id,
        mask_id=architecture.mask_id,
    )
    settings = config.objective_settings if phase is None else config.objective_settings_of(phase)
    return objective(context, objective.Config.model_validate(settings))


LossModuleFactory = Callable[[WorkerSpec, torch.device], LossModule]
"""Makes what a training trains; the same bytes at every start of a rank. `WorkerSpec.objective` names one."""


def pretraining(spec: WorkerSpec, device: torch.device) -> LossModule:  # noqa: ARG001 - the engine moves the model
    """Return the model of the configuration, with its initial weights, and the loss of its objective."""
    model = build(spec.architecture, seed=spec.config.seed)
    if spec.init_weights is not None:
        init_weights.load(model, spec.init_weights)
    checkpoint_activations(model, spec.config.activation_checkpointing)
    nats = make_objective(spec.config, spec.architecture).nats
    module = LossModule(model, spec.config.loss_chunk, nats, document_mask=spec.config.document_mask)
    if spec.config.compile:
        module.compile_model()
    return module


def make_loss_module(spec: WorkerSpec, device: torch.device) -> LossModule:
    """Return what the factory makes that `spec.objective` names."""
    module, _, name = spec.objective.partition(":")
    factory: LossModuleFactory = getattr(importlib.import_module(module), name)
    return factory(spec, device)
