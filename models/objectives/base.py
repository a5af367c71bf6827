"""What every pretraining objective supplies: inputs and targets of a micro batch, and the loss between them.

Legend: B sequences of a micro batch, T tokens of a sequence.

A module of this package defines one class `Objective(base.Objective)`, and its file name is the name that
`pretrain.objective` chooses it by. Inputs and targets are a pure function of the tokens, the seed, and the ids of the
samples, so they are the same on any number of ranks and after any resume. They are made with numpy, beside the step
that runs; torch is imported only by the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from models.architectures.config import IGNORED, Family
from models.closed import Closed

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["IGNORED", "Ids", "NoSettings", "Objective", "ObjectiveContext", "philox"]

Ids = NDArray[np.int64]


def philox(seed: int, stream: int, count: int, *, block: int = 0) -> NDArray[np.uint64]:
    """Return `count` random 64-bit words, a pure function of (seed, stream, block).

    Only the raw stream of the Philox generator is used, which numpy guarantees to be stable over versions, unlike the
    methods of `numpy.random.Generator`.
    """
    return np.random.Philox(key=[seed, stream], counter=[0, 0, block, 0]).random_raw(count)


class NoSettings(Closed):
    """The settings of an objective that has none, and the base of all others: frozen, unknown keys refused."""


@dataclass(frozen=True)
class ObjectiveContext:
    """What an objective may depend on besides the tokens."""

    seed: int
    """Of the run."""
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    """Fills a sequence; never a target."""
    mask_id: int

    @property
    def special(self) -> tuple[int, ...]:
        """The ids that stand for no text."""
        return (self.bos_id, self.eos_id, self.pad_id, self.mask_id)


class Objective(ABC):
    """What a model is asked to predict.

    Args:
        context: seed and vocabulary.
        settings: an instance of the class's `Config`.
    """

    families: ClassVar[frozenset[Family]]
    """Model families that it fits."""
    Config: ClassVar[type[NoSettings]] = NoSettings
    """Schema of `pretrain.objective_settings`."""

    def __init__(self, context: ObjectiveContext, settings: Any) -> None:
        self.context = context
        self.settings = settings

    @classmethod
    def target_share(cls, settings: Any) -> float:  # noqa: ARG003 - an objective that asks for some tokens reads them
        """Return the share of the tokens that are targets, as `settings` (an instance of `Config`) have it."""
        return 1.0

    @abstractmethod
    def targets(self, tokens_BT: Ids, samples_B: Ids, epochs_B: Ids) -> tuple[Ids, Ids]:
        """Return (inputs, targets), each [B, T]; a target is `IGNORED` where nothing is asked.

        Args:
            tokens_BT: the packed sequences, not to be changed.
            samples_B: number of each sequence; with the epoch and the seed the only source of randomness.
            epochs_B: which time it is shown.
        """

    def nats(self, model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor, chunk: int | None = None) -> Tensor:
        """Return the *sum* of nats over the targets, float32 scalar.

        A sum, because the trainer divides by the number of targets of the whole step, over all micro batches and
        ranks: so every token weighs the same however the batch is cut (users of other trainers have been bitten by
        the mean of means: accelerate#3877, torchtitan#1842).
        """
        from models.architectures.predict import language_nats

        return language_nats(model, inputs_BT, targets_BT, chunk)
