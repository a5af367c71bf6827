"""What is due around the steps of a training: one class for each concern, all of them called on every rank.

A callback may keep what its own work needs; what must survive a kill is in `Trainer.state`, since only that is saved.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from models.architectures.naming import group_of
from models.optim import lisa
from models.optim.sharded_optimizer import FragmentOptimizer
from pipelines.core import artifact
from pipelines.core.errors import NumericError
from pipelines.core.fault_injection import fault_point
from pipelines.core.launcher import beat
from pipelines.training import rollbacks
from pipelines.training.checkpoint_interval import Interval
from pipelines.training.config import CheckpointConfig
from pipelines.training.data_loader import DataLoader
from pipelines.training.engine import Engine
from pipelines.training.metrics import MetricsLog, memory_bytes
from pipelines.training.monitors.base import Monitor
from pipelines.training.optimizer_config import LisaConfig
from pipelines.training.rollbacks import Rollback
from pipelines.training.trainer import StepResult, Trainer


class Callback:
    """Called around the steps; each hook does nothing unless a subclass says what."""

    def on_start(self, trainer: Trainer) -> None:
        """Called before the first step of an attempt, and again after a return to a checkpoint."""

    def before_step(self, trainer: Trainer) -> None:
        """Called when it is certain that the next step will be taken."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Called after a step, also a skipped one."""

    def before_checkpoint(self, trainer: Trainer) -> None:
        """Called before a checkpoint claims the steps before it as done."""


# ---- LISA -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSampling(Callback):
    """LISA: draws the layers that train, by a pure function of the step."""

    settings: LisaConfig

    def on_start(self, trainer: Trainer) -> None:
        """Go on with the layers of the interval that the checkpoint was taken in."""
        if trainer.state.active is not None:
            self._activate(trainer, trainer.state.active)

    def before_step(self, trainer: Trainer) -> None:
        """Draw when the next step begins an interval."""
        step, settings, optimizer = trainer.state.step, self.settings, trainer.engine.optimizer
        if step % settings.interval:
            return
        weights: Sequence[float] | None = settings.measured or None
        if settings.weights == "norm":
            weights = lisa.layer_norms(optimizer.weight_norms())
        config = trainer.config
        drawn = lisa.draw(config.seed, step // settings.interval, config.shape.layers, settings.layers, weights)
        self._activate(trainer, list(drawn))

    def _activate(self, trainer: Trainer, layers: list[int]) -> None:
        """Train these layers and what is outside the layers; gradients of the others are not even computed."""
        trainer.state.active = layers
        module, optimizer = trainer.engine.module, trainer.engine.optimizer
        lisa.set_requires_grad(module, lisa.active_names([name for name, _ in module.named_parameters()], layers))
        optimizer.set_active(lisa.active_names(optimizer.layout.shapes, layers))


# ---- steps that went wrong ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NonFiniteSteps(Callback):
    """Describes skipped steps for `replay`, and gives up when there are too many in a row.

    Descriptions of steps that an attempt, or a return to a checkpoint, is going to take anew are removed: a replay
    would take them for steps that the run has skipped.
    """

    folder: Path

    def on_start(self, trainer: Trainer) -> None:
        """Remove the descriptions of steps that have not been taken yet."""
        if trainer.engine.ranks.rank == 0:
            for path in self.folder.glob("step-*.json"):
                if int(path.stem.removeprefix("step-")) > trainer.state.step:
                    path.unlink()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Describe the step if it was skipped.

        Raises:
            NumericError: there were more in a row than `pretrain.max_skipped`.
        """
        if not result.record.skipped:
            return
        state, path = trainer.state, self.folder / f"step-{result.step}.json"
        description = {
            "step": result.step,
            "sample_ids": trainer.loader.ids(result.step - 1, state.rollbacks).tolist(),
            "loss_by_rank": [str(loss) for loss in trainer.losses.read()[-1]],
            "grad_norm": str(result.record.grad_norm),
            "skipped_in_row": state.skipped_in_row,
            "last_checkpoint": trainer.saved,
        }
        if trainer.engine.ranks.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            artifact.write_text(path, json.dumps(description, indent=1))
        if state.skipped_in_row > trainer.config.max_skipped:
            raise NumericError(
                f"step {result.step} was not finite, {state.skipped_in_row} in a row with it; pretrain.max_skipped = "
                f"{trainer.config.max_skipped}; the batch is described in {path}",
                hint="lower pretrain.optimizer.lr or set pretrain.optimizer.clip; to do the step again and see where "
                f"it breaks: python -m pipelines.training.replay {path}",
            )


@dataclass(frozen=True)
class Monitoring(Callback):
    """Goes back to the last good checkpoint when a monitor refuses a step."""

    monitors: Mapping[str, Monitor]
    path: Path
    """Where rank 0 records the rollbacks."""

    def on_start(self, trainer: Trainer) -> None:
        """Let the monitors remember what the checkpoint has, and see that there is one to go back to."""
        for name, monitor in self.monitors.items():
            monitor.load(trainer.state.monitors.get(name, {}))
        if trainer.state.step == 0:  # one that exists already is left as it is
            trainer.write_checkpoint(wait=True)

    def before_checkpoint(self, trainer: Trainer) -> None:
        """Put what the monitors remember into the state."""
        trainer.state.monitors = {name: monitor.state() for name, monitor in self.monitors.items()}

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Show every monitor the loss.

        Raises:
            NumericError: a monitor refused the step after its last rollback.
        """
        if result.record.skipped:
            return
        loss = sum(trainer.losses.read()[-1])
        for name, monitor in self.monitors.items():
            if (reason := monitor.refuses(loss)) is not None:
                self._go_back(trainer, name, reason)
                return

    def _go_back(self, trainer: Trainer, name: str, reason: str) -> None:
        """Restore the last good checkpoint; the data since then is left out from now on.

        The state before this step may be what went wrong, so a checkpoint of it goes too.
        """
        earlier, spiked_at = trainer.state.rollbacks, trainer.state.step
        limit = self.monitors[name].settings.max_rollbacks
        if (times := sum(each.monitor == name for each in earlier)) >= limit:
            raise NumericError(
                f"step {spiked_at}: {reason}, after {times} rollbacks; "
                f"pretrain.monitors.{name}.max_rollbacks = {limit}",
                hint=f"lower pretrain.optimizer.lr or change pretrain.monitors.{name}",
            )
        trainer.restore_before(spiked_at - 1)
        step = trainer.state.step
        samples = sum(rollbacks.samples_between(phase, step, spiked_at) for phase in trainer.loader.phases)
        trainer.state.rollbacks = [*earlier, Rollback(step, spiked_at, samples, name, reason)]
        if trainer.engine.ranks.rank == 0:
            rollbacks.write(self.path, trainer.state.rollbacks)
        trainer.start()
        fault_point("train.after_rollback", step=step)


# ---- what is seen and kept ------------------------------------------------------------------------------------------


class Validation(Callback):
    """Measures the loss on the validation sample, at intervals and after the last step."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Validate when it is due."""
        if not validation_is_due(trainer, result.step):
            return
        with trainer.times("validate"):
            loss = validate(trainer.engine, trainer.loader)
        trainer.state.validation = loss
        trainer.state.best = loss if trainer.state.best is None else min(trainer.state.best, loss)


class Checkpointing(Callback):
    """Saves the state, at intervals and after the last step.

    Args:
        settings: the interval, or the rate of faults that it follows from.
    """

    def __init__(self, settings: CheckpointConfig) -> None:
        self._every = settings.every
        self._interval = None if settings.faults_per_day is None else Interval(settings.faults_per_day)
        self._due, self._since = settings.every, (0, time.monotonic())

    def on_start(self, trainer: Trainer) -> None:
        """Count the first interval from here."""
        self._due, self._since = trainer.state.step + self._every, (trainer.state.step, time.monotonic())

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Save when it is due; the last checkpoint is waited for."""
        last = result.step == trainer.config.steps
        if self._interval is None:
            if last or result.step % self._every == 0:
                trainer.save(wait=last)
        elif last or result.step >= self._due:
            started, (step, moment) = time.monotonic(), self._since
            trainer.save(wait=last)
            self._since = result.step, time.monotonic()
            own = [self._since[1] - started, (started - moment) / (result.step - step)]
            save_s, step_s = (total / trainer.engine.ranks.world for total in trainer.engine.ranks.summed(own))
            self._due = result.step + self._interval.steps(save_s=save_s, step_s=step_s)


class Work(NamedTuple):
    """How much was computed up to some step, by all ranks together."""

    positions: int
    """Tokens with their padding."""
    flops: float


class Logging(Callback):
    """Writes the exact loss of every step, and every `log_every` steps a record of how training goes.

    Args:
        metrics: `metrics.jsonl`; None on every rank but the first.
        losses: `losses.jsonl`; None on every rank but the first.
        work: what was done before a step.
        peak_flops: of all ranks together.
    """

    def __init__(
        self, metrics: MetricsLog | None, losses: MetricsLog | None, work: Callable[[int], Work], peak_flops: float
    ) -> None:
        self._metrics = metrics
        self._losses = losses
        self._work = work
        self._peak_flops = peak_flops
        self._recorded = self._tokens = 0
        """Step of the last record, where the times of the next one begin, and the tokens until then."""

    def on_start(self, trainer: Trainer) -> None:
        """Forget what was written of steps that are going to be taken anew."""
        for log in self._logs():
            log.cut_back(trainer.state.step)
        self._recorded, self._tokens = trainer.state.step, trainer.state.tokens
        trainer.times.take()

    def before_checkpoint(self, trainer: Trainer) -> None:
        """Put everything on the disk."""
        self._write_losses(trainer, trainer.state.step)
        for log in self._logs():
            log.sync()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Write what is due; only then is the device read."""
        validated = validation_is_due(trainer, result.step)
        if not validated and result.step % trainer.config.log_every:
            return
        loss = sum(trainer.losses.read()[-1])
        self._write_losses(trainer, result.step)
        if self._metrics is not None:
            self._metrics.append(self._record(trainer, result, loss, validated=validated))

    def close(self) -> None:
        """Close the files."""
        for log in self._logs():
            log.close()

    def _logs(self) -> list[MetricsLog]:
        return [log for log in (self._metrics, self._losses) if log is not None]

    def _write_losses(self, trainer: Trainer, last: int) -> None:
        """Write the losses of the steps up to `last` that are not written yet; every rank takes part."""
        by_rank = trainer.losses.read()
        for step, parts in enumerate(by_rank, start=last - len(by_rank) + 1):
            exact: dict[str, Any] = {"step": step, "loss": float(sum(parts)).hex()}
            if step == last and validation_is_due(trainer, step) and trainer.state.validation is not None:
                exact["validation"] = trainer.state.validation.hex()
            if self._losses is not None:
                self._losses.append(exact)
        trainer.losses.forget()

    def _record(self, trainer: Trainer, result: StepResult, loss: float, *, validated: bool) -> dict[str, Any]:
        state, times = trainer.state, trainer.times.take()
        busy = sum(times.get(part, 0.0) for part in ("data", "forward", "backward", "step"))
        done, before = self._work(result.step), self._work(self._recorded)
        tokens, self._recorded, self._tokens = state.tokens - self._tokens, result.step, state.tokens
        pace = 1.0 / busy if busy else 0.0
        useful = tokens / (done.positions - before.positions)  # padding is computed too, and counts for nothing
        values: dict[str, Any] = {
            "step": result.step,
            "tokens": state.tokens,
            "batch": trainer.loader.digest(result.step - 1, state.rollbacks),
            "loss": _finite(loss),
            "lr": result.lr,
            "grad_norm": _finite(result.record.grad_norm),
            "skipped": state.skipped,
            "tokens_per_s": round(tokens * pace, 1),
            "mfu": round((done.flops - before.flops) * useful * pace / self._peak_flops, 4),
            "memory_bytes": memory_bytes(trainer.engine.ranks.device),
        }
        values |= {f"time/{part}": round(seconds, 4) for part, seconds in times.items()}
        values |= {f"trust/{group}": ratio for group, ratio in ratios_by_group(trainer.engine.optimizer).items()}
        if state.active is not None:
            values["lisa/active"] = state.active
        if trainer.config.monitors:
            values["rollbacks"] = len(state.rollbacks)
        if validated:
            values["val/loss"] = state.validation
        return values


def validation_is_due(trainer: Trainer, step: int) -> bool:
    """Tell whether a validation follows a step."""
    return step % trainer.config.validate_every == 0 or step == trainer.config.steps


def validate(engine: Engine, loader: DataLoader) -> float:
    """Return the mean nats per target over the validation sample; every rank takes part and gets the same number."""
    nats, targets = torch.zeros((), dtype=torch.float64, device=engine.ranks.device), 0
    with torch.no_grad():
        for batch in loader.validation_batches():
            nats += engine.loss(batch).double()
            targets += batch.targets
            beat()
    total_nats, total_targets = engine.ranks.summed([float(nats), targets])
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
