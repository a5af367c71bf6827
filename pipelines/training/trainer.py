"""The training loop: one step after the other, the same on every rank, resumable at every step.

Everything random is a function of (seed, step), so the state that has to be saved beside weights and moments is a few
numbers. Ranks agree on what happens next through two small sums per step: the number of targets and requests to stop
before it, the loss after it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from models.architectures.naming import group_of
from models.optim import lisa
from models.optim.sharded_optimizer import FragmentOptimizer, StepRecord
from pipelines.core import artifact
from pipelines.core.errors import NumericError, Preempted
from pipelines.core.fault_injection import fault_point
from pipelines.core.launcher import beat
from pipelines.training.config import PretrainConfig
from pipelines.training.data_loader import Feed
from pipelines.training.engine import Engine
from pipelines.training.loss_spikes import Rollback, extended, is_spike, shown
from pipelines.training.loss_spikes import write as write_rollbacks
from pipelines.training.metrics import MetricsLog
from pipelines.training.optimizers import learning_rate
from pipelines.training.throughput import TimeSplit, memory_bytes


@dataclass
class State:
    """What a checkpoint holds besides weights, moments and counters: JSON values only."""

    step: int = 0
    """Steps done, skipped ones included."""
    skipped: int = 0
    skipped_in_row: int = 0
    recent: list[float] = field(default_factory=list)
    """The last losses, where spikes are looked for."""
    rollbacks: list[Rollback] = field(default_factory=list)
    active: list[int] | None = None
    """Layers of LISA's current interval."""
    validation: float | None = None
    """Last validation loss, nats per target."""
    best: float | None = None
    """Lowest validation loss."""

    def __post_init__(self) -> None:
        self.rollbacks = [Rollback.of(found) for found in self.rollbacks]


class Work(NamedTuple):
    """How much was done up to some step."""

    tokens: int
    flops: float


class Saves(Protocol):
    """What the loop needs of `checkpoint.Checkpoints`."""

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


@dataclass(frozen=True)
class Journal:
    """Where rank 0 writes what happened; the other ranks have an empty one."""

    metrics: MetricsLog | None = None
    losses: MetricsLog | None = None

    def logs(self) -> list[MetricsLog]:
        """Return the files that this rank has."""
        return [log for log in (self.metrics, self.losses) if log is not None]

    def close(self) -> None:
        """Close the files."""
        for log in self.logs():
            log.close()


@dataclass
class Trainer:
    """Trains from `state.step` to `config.steps`."""

    config: PretrainConfig
    engine: Engine
    feed: Feed
    saves: Saves | None
    """None where nothing is to be written, as in a replay."""
    state: State
    diagnostics: Path
    rollbacks: Path
    """Where rank 0 records returns from spikes."""
    journal: Journal
    stop_requested: Callable[[], bool]
    work: Callable[[int], Work]
    """What was done before a step, by all ranks together."""
    peak_flops: float
    """Of all ranks together."""
    _saved: int = -1
    _times: TimeSplit = field(init=False)

    def __post_init__(self) -> None:
        self._times = TimeSplit(self.engine.ranks.device)
        self._saved = self.state.step

    def run(self) -> None:
        """Train to the end.

        Raises:
            Preempted: some rank was asked to stop; the state is saved.
            NumericError: more non-finite steps in a row than allowed.
        """
        if self.state.active is not None:
            self.activate(self.state.active)
        if self.config.spike.factor is not None and self.state.step == 0:
            self._write(wait=True)  # somewhere to go back to
        while self.state.step < self.config.steps:
            self.advance()
            beat()

    # ---- one step -------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Take one step, skipped or not, and what is due after it."""
        step = self.engine.objective.step = self.state.step
        with self._times("data"):
            batches = self.feed.batches(step, self.state.rollbacks)
        targets, stops = self.engine.ranks.summed([sum(b.targets for b in batches), self.stop_requested()])
        if stops:
            self._save(wait=True)
            raise Preempted(f"stopped after step {step}", hint="run the same command again: it goes on from there")
        self.draw_when_due()
        own = self._gradients(batches, 1.0 / max(targets, 1.0))
        lr = learning_rate(self.config, step)
        with self._times("step"):
            record = self.engine.step(lr)
        losses = self.engine.ranks.gathered(own)
        self.state.step += 1
        self._note(record, losses)
        fault_point("train.after_step", step=self.state.step)
        if not record.skipped and self._went_back(sum(losses)):
            return
        validated = self._validate_when_due()
        self._log(sum(losses), lr, record, validated)
        self._save_when_due()

    def _gradients(self, batches: list[Any], share: float) -> float:
        """Accumulate the gradients of a step; return this rank's part of its loss, nats per target."""
        gain = torch.full((), share, device=self.engine.ranks.device)
        fault_point("train.loss", step=self.state.step + 1, tensor=gain)
        parts = []
        for number, batch in enumerate(batches, start=1):
            with self._times("forward"):
                loss = self.engine.loss(batch) * gain
            with self._times("backward"):
                self.engine.backward(loss, last=number == len(batches))
            parts.append(loss.detach())
        return float(torch.stack(parts).double().sum())

    def _note(self, record: StepRecord, losses: list[float]) -> None:
        """Count a skipped step, and give up when there were too many in a row."""
        state = self.state
        state.skipped += record.skipped
        state.skipped_in_row = state.skipped_in_row + 1 if record.skipped else 0
        if not record.skipped:
            return
        path = self.diagnostics / f"step-{state.step}.json"
        if self.engine.ranks.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            artifact.write_text(path, json.dumps(self._diagnosis(record, losses), indent=1))
        if state.skipped_in_row > self.config.max_skipped:
            raise NumericError(
                f"step {state.step} was not finite, {state.skipped_in_row} in a row with it; pretrain.max_skipped = "
                f"{self.config.max_skipped}; the batch is described in {path}",
                hint="lower pretrain.optimizer.lr or set pretrain.optimizer.clip; to do the step again and see where "
                f"it breaks: python -m pipelines.training.replay {path}",
            )

    def _diagnosis(self, record: StepRecord, losses: list[float]) -> dict[str, Any]:
        last = self.state.step - 1
        return {
            "step": self.state.step,
            "sample_ids": self.feed.ids(last, self.state.rollbacks).tolist(),
            "loss_by_rank": [str(loss) for loss in losses],
            "grad_norm": str(record.grad_norm),
            "skipped_in_row": self.state.skipped_in_row,
            "last_checkpoint": self._saved,
        }

    # ---- spikes ---------------------------------------------------------------------------------------------------

    def _went_back(self, loss: float) -> bool:
        """Go back if the loss is a spike; else remember it.

        Raises:
            NumericError: it happened too often.
        """
        spike, state = self.config.spike, self.state
        if spike.factor is None:
            return False
        if not is_spike(loss, state.recent, factor=spike.factor, window=spike.window):
            state.recent = extended(state.recent, loss, spike.window)
            return False
        median = statistics.median(state.recent)
        if len(state.rollbacks) >= spike.max_rollbacks:
            raise NumericError(
                f"step {state.step}: the loss is {loss:.4g}, the median before it {median:.4g}, after "
                f"{len(state.rollbacks)} rollbacks; pretrain.spike.max_rollbacks = {spike.max_rollbacks}",
                hint="lower pretrain.optimizer.lr or raise pretrain.spike.factor",
            )
        self._go_back(loss, median)
        return True

    def _go_back(self, loss: float, median: float) -> None:
        """Restore the last good checkpoint; the data since then is left out from now on.

        The state before this step may be what spiked, so a checkpoint of it goes too.
        """
        assert self.saves is not None, "going back needs checkpoints"
        spiked_at, rollbacks, ranks = self.state.step, self.state.rollbacks, self.engine.ranks
        saved = self.saves.go_back(spiked_at - 1, self.engine.optimizer, rank=ranks.rank, world=ranks.world)
        self.engine.publish_weights()
        self.state = State(**saved)
        step = self._saved = self.state.step
        samples = sum(shown(phase, step, spiked_at) for phase in self.feed.plan)
        self.state.rollbacks = [*rollbacks, Rollback(step, spiked_at, samples, loss, median)]
        if ranks.rank == 0:
            write_rollbacks(self.rollbacks, self.state.rollbacks)
        for log in self.journal.logs():
            log.cut_back(step)
        if self.state.active is not None:
            self.activate(self.state.active)
        fault_point("train.after_rollback", step=step)

    # ---- LISA -----------------------------------------------------------------------------------------------------

    def draw_when_due(self) -> None:
        """Draw the layers of the interval that the next step begins, if it begins one."""
        settings, step = self.config.lisa, self.state.step
        if settings.enabled and step % settings.interval == 0:
            self.activate(self._draw(step // settings.interval))

    def _draw(self, interval: int) -> list[int]:
        settings, optimizer = self.config.lisa, self.engine.optimizer
        weights: Sequence[float] | None = settings.measured or None
        if settings.weights == "norm":
            weights = lisa.layer_norms(optimizer.weight_norms())
        return list(lisa.draw(self.config.seed, interval, self.config.shape.layers, settings.layers, weights))

    def activate(self, active: list[int]) -> None:
        """Train these layers and what is outside the layers; gradients of the others are not even computed."""
        self.state.active = active
        objective, optimizer = self.engine.objective, self.engine.optimizer
        lisa.set_requires_grad(objective, lisa.active_names([name for name, _ in objective.named_parameters()], active))
        optimizer.set_active(lisa.active_names(optimizer.layout.shapes, active))

    # ---- around a step --------------------------------------------------------------------------------------------

    def _validate_when_due(self) -> bool:
        if self.state.step % self.config.validate_every and self.state.step != self.config.steps:
            return False
        with self._times("validate"):
            loss = validate(self.engine, self.feed)
        self.state.validation = loss
        self.state.best = loss if self.state.best is None else min(self.state.best, loss)
        return True

    def _save_when_due(self) -> None:
        if self.state.step % self.config.checkpoint.every == 0 or self.state.step == self.config.steps:
            self._save(wait=self.state.step == self.config.steps)

    def _save(self, *, wait: bool) -> None:
        """Save the state, except amid non-finite steps: the older checkpoint is the one that is known to be good."""
        if self.saves is not None and not self.state.skipped_in_row and self._saved != self.state.step:
            self._write(wait=wait)

    def _write(self, *, wait: bool) -> None:
        assert self.saves is not None, "a replay writes nothing"
        ranks = self.engine.ranks
        with self._times("checkpoint"):
            for log in self.journal.logs():
                log.sync()
            self.saves.save(
                self.state.step,
                self.engine.optimizer,
                asdict(self.state),
                rank=ranks.rank,
                world=ranks.world,
                wait=wait,
            )
        self._saved = self.state.step

    def _log(self, loss: float, lr: float, record: StepRecord, validated: bool) -> None:
        if self.journal.losses is None or self.journal.metrics is None:
            return
        exact: dict[str, Any] = {"step": self.state.step, "loss": loss.hex()}
        if validated and self.state.validation is not None:
            exact["validation"] = self.state.validation.hex()
        self.journal.losses.append(exact)
        if self.state.step % self.config.log_every == 0 or validated:
            self.journal.metrics.append(self._record(loss, lr, record, validated))

    def _record(self, loss: float, lr: float, record: StepRecord, validated: bool) -> dict[str, Any]:
        times = self._times.take()
        counted = self.config.log_every if self.state.step % self.config.log_every == 0 else 1
        busy = sum(times.get(part, 0.0) for part in ("data", "forward", "backward", "step"))
        done, before = self.work(self.state.step), self.work(self.state.step - counted)
        pace = 1.0 / busy if busy else 0.0
        values: dict[str, Any] = {
            "step": self.state.step,
            "tokens": done.tokens,
            "loss": _finite(loss),
            "lr": lr,
            "grad_norm": _finite(record.grad_norm),
            "skipped": self.state.skipped,
            "tokens_per_s": round((done.tokens - before.tokens) * pace, 1),
            "mfu": round((done.flops - before.flops) * pace / self.peak_flops, 4),
            "memory_bytes": memory_bytes(self.engine.ranks.device),
        }
        values |= {f"time/{part}": round(seconds, 4) for part, seconds in times.items()}
        values |= {f"trust/{group}": ratio for group, ratio in ratios_by_group(self.engine.optimizer).items()}
        if self.state.active is not None:
            values["lisa/active"] = self.state.active
        if self.config.spike.factor is not None:
            values["rollbacks"] = len(self.state.rollbacks)
        if validated:
            values["val/loss"] = self.state.validation
        return values


def validate(engine: Engine, feed: Feed) -> float:
    """Return the mean nats per target over the validation sample; every rank takes part and gets the same number."""
    nats, targets = 0.0, 0
    with torch.no_grad():
        for batch in feed.validation_batches():
            nats += float(engine.loss(batch))
            targets += batch.targets
            beat()
    total_nats, total_targets = engine.ranks.summed([nats, targets])
    return total_nats / max(total_targets, 1.0)


def ratios_by_group(optimizer: FragmentOptimizer) -> dict[str, float]:
    """Return the mean trust ratio of the adapted tensors of each group: layers, embedding, head."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, ratio in optimizer.trust_ratios().items():
        groups[group_of(name)].append(ratio)
    return {group: sum(ratios) / len(ratios) for group, ratios in sorted(groups.items())}


def _finite(value: float) -> float | None:
    """Return the value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None
