"""What a model is asked to predict: the next token (decoder) or the hidden tokens (encoder).

Legend: B sequences of a micro batch, T tokens of a sequence, N targets, V vocabulary.

A loss is the *sum* of nats over the targets. The trainer divides it by the number of targets of the whole step, over
all micro batches and ranks, so every token weighs the same however the batch is cut (users of other trainers have been
bitten by the mean of means: accelerate#3877, torchtitan#1842).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.architectures import predict
from models.architectures.build import build
from models.architectures.predict import IGNORED
from pipelines.training import init_weights
from pipelines.training.config import MaskingConfig
from pipelines.training.data_order import Ids, philox
from pipelines.training.worker_spec import WorkerSpec

VALIDATION_EPOCH = 2**32 - 1
"""The epoch whose masks validation uses, every time the same."""

_HALF = np.uint64(32)
_TWO_32 = float(2**32)


@dataclass(frozen=True)
class Batch:
    """One micro batch."""

    inputs_BT: Tensor
    targets_BT: Tensor
    """`IGNORED` where nothing is asked."""

    @property
    def targets(self) -> int:
        """Number of targets."""
        return int((self.targets_BT != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        return Batch(self.inputs_BT.to(device), self.targets_BT.to(device))


# ---------------------------------------------------------------------------------------------------------------------
# Targets: pure functions of the tokens, the seed, and the ids of the samples


def causal_targets(tokens_BT: Ids, pad_id: int) -> Ids:
    """Return the next token of every position; the last position and padding ask for nothing."""
    targets_BT = np.full_like(tokens_BT, IGNORED)
    targets_BT[:, :-1] = tokens_BT[:, 1:]
    targets_BT[targets_BT == pad_id] = IGNORED
    return targets_BT


def hide_tokens(
    tokens_T: Ids, *, seed: int, sample: int, epoch: int, rule: MaskingConfig, vocab_size: int, special: tuple[int, ...]
) -> tuple[Ids, Ids]:
    """Return (shown tokens, targets) of one sequence under masked language modelling.

    A token is a target with `rule.probability`; a target is shown as the mask token (the last of `special`), as a
    random token, or as itself. Special tokens are never targets. The choice is a pure function of (seed, sample,
    epoch): each 64-bit word of the sample's own stream decides one token, its high half whether, its low half how.
    """
    length = len(tokens_T)
    words = philox(seed, sample, 2 * length, block=epoch + 1)
    chosen = (words[:length] >> _HALF) < rule.probability * _TWO_32
    chosen &= ~np.isin(tokens_T, special)
    kind = (words[:length] & np.uint64(2**32 - 1)) / _TWO_32
    random_tokens = (words[length:] % np.uint64(vocab_size)).astype(tokens_T.dtype)
    shown_T = np.where(chosen & (kind < rule.mask), special[-1], tokens_T)
    shown_T = np.where(chosen & (kind >= rule.mask) & (kind < rule.mask + rule.random), random_tokens, shown_T)
    return shown_T, np.where(chosen, tokens_T, IGNORED)


@dataclass(frozen=True)
class CausalTask:
    """Predict the next token."""

    pad_id: int

    def batch(self, tokens_BT: Ids, samples_B: Ids, epochs_B: NDArray[np.int64]) -> Batch:
        """Return the micro batch of these sequences; samples and epochs have no part in it."""
        del samples_B, epochs_B
        return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(causal_targets(tokens_BT, self.pad_id)))


@dataclass(frozen=True)
class MaskedTask:
    """Restore hidden tokens."""

    rule: MaskingConfig
    seed: int
    vocab_size: int
    special: tuple[int, ...]
    """Ids that are never targets; the last one is the mask token."""

    def batch(self, tokens_BT: Ids, samples_B: Ids, epochs_B: NDArray[np.int64]) -> Batch:
        """Return the micro batch of these sequences, each masked by its own stream of this epoch."""
        pairs = [
            hide_tokens(
                tokens_T,
                seed=self.seed,
                sample=int(sample),
                epoch=int(epoch),
                rule=self.rule,
                vocab_size=self.vocab_size,
                special=self.special,
            )
            for tokens_T, sample, epoch in zip(tokens_BT, samples_B, epochs_B, strict=True)
        ]
        shown, targets = (np.stack(part) for part in zip(*pairs, strict=True))
        return Batch(torch.from_numpy(shown), torch.from_numpy(targets))


Task = CausalTask | MaskedTask


# ---------------------------------------------------------------------------------------------------------------------
# Losses


class Objective(nn.Module):
    """A transformers model with its loss: what the engine wraps.

    Args:
        model: a decoder or an encoder with its output layer.
        loss_chunk: see `models.architectures.predict.language_nats`.
    """

    def __init__(self, model: nn.Module, loss_chunk: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.loss_chunk = loss_chunk
        self.step = 0
        """Steps done when the current one began; the loop sets it."""

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the summed nats of the micro batch, float32 scalar."""
        return predict.language_nats(self.model, inputs_BT, targets_BT, self.loss_chunk)

    def compile_model(self) -> None:
        """Compile everything up to the logits at its first use; parameters keep their names."""
        cast("Any", self.model).model.compile()


ObjectiveFactory = Callable[[WorkerSpec, torch.device], Objective]
"""Makes what a training trains; the same bytes at every start of a rank. `WorkerSpec.objective` names one."""


def pretraining(spec: WorkerSpec, device: torch.device) -> Objective:  # noqa: ARG001 - the engine moves the model
    """Return the model of the configuration, with its initial weights, and the loss of its targets."""
    model = build(spec.architecture, seed=spec.config.seed)
    if spec.init_weights is not None:
        init_weights.load(model, spec.init_weights)
    objective = Objective(model, spec.config.loss_chunk)
    if spec.config.compile:
        objective.compile_model()
    return objective


def make_objective(spec: WorkerSpec, device: torch.device) -> Objective:
    """Return what the factory makes that `spec.objective` names."""
    module, _, name = spec.objective.partition(":")
    factory: ObjectiveFactory = getattr(importlib.import_module(module), name)
    return factory(spec, device)
