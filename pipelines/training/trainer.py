"""The trainer: one step after the other, the same on every rank, resumable at every step.

Everything random is a function of (seed, step), so the state that has to be saved beside weights and moments is a few
numbers. What is due around a step - drawing layers, validation, records, checkpoints, monitors - is a callback.

The step reads nothing from the device. (The optimizer does, once or twice: it decides on the host whether to write at
all, see `models.optim.sharded_optimizer`.) The number of targets is counted where the batch is made; ranks agree on it
and on requests to stop from host to host; losses stay on the device until a record is due.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from models.optim.sharded_optimizer import FragmentOptimizer, StepRecord
from pipelines.core.errors import Preempted
from pipelines.core.fault_injection import fault_point
from pipelines.core.launcher import beat
from pipelines.training.config import PretrainConfig
from pipelines.training.data_loader import Batch, DataLoader, Prefetcher
from pipelines.training.engine import Engine
from pipelines.training.metrics import TimeSplit
from pipelines.training.optimizers import learning_rate
from pipelines.training.rollbacks import Rollback

if TYPE_CHECKING:
    from pipelines.training.callbacks import Callback


@dataclass
class State:
    """What a checkpoint holds besides weights, moments and counters: JSON values only."""

    step: int = 0
    """Steps done, skipped ones included."""
    skipped: int = 0
    skipped_in_row: int = 0
    tokens: int = 0
    """Tokens of all steps and ranks, without padding."""
    monitors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each monitor remembers."""
    rollbacks: list[Rollback] = field(default_factory=list)
    active: list[int] | None = None
    """Layers of LISA's current interval."""
    validation: float | None = None
    """Last validation loss, nats per target."""
    best: float | None = None
    """Lowest validation loss."""

    def __post_init__(self) -> None:
        self.rollbacks = [Rollback.of(value) for value in self.rollbacks]


class Checkpointer(Protocol):
    """What the trainer needs of `checkpoint.Checkpoints`."""

    def save(
        self,
        step: int,
        optimizer: FragmentOptimizer,
        state: Mapping[str, Any],
        *,
        rank: int,
        world: int,
        wait: bool,
    ) -> None:
        """Save one checkpoint, in the background unless `wait`; every rank calls it."""
        ...

    def go_back(self, before: int, optimizer: FragmentOptimizer, *, rank: int, world: int) -> dict[str, Any]:
        """Load the newest checkpoint before a step and forget the later ones; every rank calls it."""
        ...


class StepLosses:
    """The losses of the last steps, on the device until somebody reads them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._own: list[Tensor] = []
        self.by_rank: list[list[float]] = []
        """Of each step since the last `forget`, each rank's part of the loss in nats per target; see `read`."""

    def add(self, own: Tensor) -> None:
        """Append this rank's part of a step's loss, a float64 scalar."""
        self._own.append(own)

    def read(self) -> list[list[float]]:
        """Return `by_rank` with all steps in it: a collective call that waits for the device."""
        if self._own:
            self.by_rank += self._engine.ranks.gathered_rows(torch.stack(self._own))
            self._own = []
        return self.by_rank

    def forget(self) -> None:
        """Begin anew, when the losses have been written down or their steps undone."""
        self._own, self.by_rank = [], []


@dataclass(frozen=True)
class StepResult:
    """What is known of a step without reading the device."""

    step: int
    """Steps done, this one included."""
    lr: float
    record: StepRecord


@dataclass
class Trainer:
    """Trains from `state.step` to `config.steps`."""

    config: PretrainConfig
    engine: Engine
    loader: DataLoader
    checkpointer: Checkpointer | None
    """None where nothing is to be written, as in a replay."""
    state: State
    callbacks: Sequence[Callback]
    """In the order in which they are called."""
    stop_requested: Callable[[], bool]
    times: TimeSplit = field(init=False)
    losses: StepLosses = field(init=False)
    saved: int = field(init=False)
    """Step of the last checkpoint."""
    _batches: Prefetcher = field(init=False)

    def __post_init__(self) -> None:
        self.times = TimeSplit(self.engine.ranks.device)
        self.losses = StepLosses(self.engine)
        self.saved = self.state.step
        self._batches = Prefetcher(self.loader, self.config.steps)

    def run(self) -> None:
        """Train to the end.

        Raises:
            Preempted: some rank was asked to stop; the state is saved.
            NumericError: more non-finite steps in a row than allowed, or more rollbacks.
        """
        try:
            self.start()
            while self.state.step < self.config.steps:
                self.advance()
                beat()
        finally:
            self._batches.close()

    def start(self) -> None:
        """Bring everything into the form that the next step needs; again after a return to a checkpoint."""
        for callback in self.callbacks:
            callback.on_start(self)

    def advance(self) -> None:
        """Take one step, skipped or not, and what is due around it."""
        state, engine = self.state, self.engine
        step = engine.module.step = state.step
        with self.times("data"):
            batches = self._batches.batches(step, state.rollbacks)
        own = [sum(batch.targets for batch in batches), sum(batch.tokens for batch in batches), self.stop_requested()]
        targets, tokens, stops = engine.ranks.summed(own)
        if stops:
            self._stop()
        for callback in self.callbacks:
            callback.before_step(self)
        self.losses.add(self._accumulate_gradients(batches, 1.0 / max(targets, 1.0)))
        lr = learning_rate(self.config, step)
        with self.times("step"):
            record = engine.step(lr)
        state.step += 1
        state.tokens += int(tokens)
        state.skipped += record.skipped
        state.skipped_in_row = state.skipped_in_row + 1 if record.skipped else 0
        fault_point("train.after_step", step=state.step)
        result = StepResult(state.step, lr, record)
        for callback in self.callbacks:
            callback.after_step(self, result)
            if self.state.step != result.step:  # it went back: nothing more is due after a step that is undone
                return

    def _accumulate_gradients(self, batches: list[Batch], share: float) -> Tensor:
        """Accumulate the gradients of a step; return this rank's part of its loss, nats per target, on the device."""
        gain = torch.full((), share, device=self.engine.ranks.device)
        fault_point("train.loss", step=self.state.step + 1, tensor=gain)
        parts = []
        for number, batch in enumerate(batches, start=1):
            with self.times("forward"):
                loss = self.engine.loss(batch) * gain
            with self.times("backward"):
                self.engine.backward(loss, last=number == len(batches))
            parts.append(loss.detach())
        return torch.stack(parts).double().sum()

    def _stop(self) -> None:
        self.save(wait=True)
        raise Preempted(
            f"stopped after step {self.state.step}", hint="run the same command again: it goes on from there"
        )

    # ---- the state, saved and restored ----------------------------------------------------------------------------

    def save(self, *, wait: bool) -> None:
        """Save the state, except amid non-finite steps: the older checkpoint is the one that is known to be good."""
        if self.checkpointer is not None and not self.state.skipped_in_row and self.saved != self.state.step:
            self.write_checkpoint(wait=wait)

    def write_checkpoint(self, *, wait: bool) -> None:
        """Save the state, after everything that was recorded of the steps before it is on the disk."""
        assert self.checkpointer is not None, "a replay writes nothing"
        for callback in self.callbacks:
            callback.before_checkpoint(self)
        ranks, state = self.engine.ranks, self.state
        with self.times("checkpoint"):
            self.checkpointer.save(
                state.step, self.engine.optimizer, asdict(state), rank=ranks.rank, world=ranks.world, wait=wait
            )
        self.saved = state.step

    def restore_before(self, step: int) -> None:
        """Go back to the newest checkpoint before a step; later ones are removed."""
        assert self.checkpointer is not None, "going back needs checkpoints"
        ranks = self.engine.ranks
        restored = self.checkpointer.go_back(step, self.engine.optimizer, rank=ranks.rank, world=ranks.world)
        self.engine.copy_to_weights()
        self.losses.forget()
        self.state = State(**restored)
        self.saved = self.state.step
