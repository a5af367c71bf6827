"""`python -m pipelines.training.replay DIAGNOSTICS/step-N.json`: what made a step not finite, found by doing it again.

Loads the last checkpoint before the step, trains up to it in one process (leaving out the steps that were skipped),
and computes its loss and gradients on the same sequences while watching every module. It reads the run's scratch
folder and changes nothing there. A step that turns out finite here was spoilt by something outside weights and data:
memory, a device, the network; the rank is named.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.architectures.naming import group_of
from pipelines.core.artifact import read_json
from pipelines.core.errors import ConfigError, IngotError
from pipelines.training import phases, rollbacks, worker
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.engine import Engine
from pipelines.training.trainer import State, Trainer
from pipelines.training.worker_spec import WorkerSpec


@dataclass
class Watch:
    """Remembers where the first value that is not finite appeared, in the order of computation."""

    output: str | None = None
    """Module whose output had it first; its inputs were finite."""
    gradient: str | None = None
    """Parameter whose gradient had it first, counted from the loss backwards."""
    _hooks: list[Any] = field(default_factory=list)

    def __call__(self, model: nn.Module) -> Watch:
        """Watch a model until `stop`."""
        for name, module in model.named_modules():
            self._hooks.append(module.register_forward_hook(self._after_forward(name or type(model).__name__)))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._after_backward(name)))
        return self

    def stop(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _after_forward(self, name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self.output is None and not all(map(_finite, _tensors(output))):
                self.output = name

        return look

    def _after_backward(self, name: str) -> Any:
        def look(parameter: Tensor) -> None:
            if self.gradient is None and parameter.grad is not None and not _finite(parameter.grad):
                self.gradient = name

        return look


@dataclass(frozen=True)
class MicroBatch:
    """One micro batch of the step."""

    rank: int
    """That computed it in the run."""
    samples: list[int]
    targets: int
    nats_per_target: float


@dataclass(frozen=True)
class Report:
    """What the step did this time."""

    step: int
    checkpoint: int
    again: int
    """Steps trained again between the checkpoint and this one."""
    micro_batches: list[MicroBatch]
    norms: dict[str, float]
    """Gradient norm of each group of tensors: layers, embedding, head, norm."""
    weights: list[str]
    """Parameters that were not finite before the step."""
    output: str | None
    gradient: str | None
    recorded: dict[str, Any]

    @property
    def finite(self) -> bool:
        """Whether nothing was wrong this time."""
        return not self.weights and self.output is None and self.gradient is None

    def lines(self) -> list[str]:
        """Return the report for people."""
        lines = [
            f"step {self.step}, from the checkpoint of step {self.checkpoint} and {self.again} steps trained again"
        ]
        for number, micro_batch in enumerate(self.micro_batches):
            ids = ", ".join(map(str, micro_batch.samples))
            lines.append(
                f"micro batch {number} (rank {micro_batch.rank}; samples {ids}): loss {micro_batch.nats_per_target:.4f}"
            )
        lines += [f"gradient norm of {group}: {norm:.4g}" for group, norm in self.norms.items()]
        lines.append(f"weights that are not finite before the step: {', '.join(self.weights) or 'none'}")
        lines.append(f"first output that is not finite: {self.output or 'none'}")
        lines.append(f"first gradient that is not finite, from the loss backwards: {self.gradient or 'none'}")
        if self.finite:
            losses = self.recorded["loss_by_rank"]
            bad = [str(rank) for rank, loss in enumerate(losses) if not math.isfinite(float(loss))]
            where = f"rank {', '.join(bad)}" if bad else "a gradient on some rank"
            lines.append(f"All is finite here: look at the memory, device and network of the run; it was {where}.")
        return lines


def replay(diagnostics: Path) -> Report:
    """Do a recorded step again.

    Args:
        diagnostics: `step-N.json` in the diagnostics folder of a run's scratch folder.

    Raises:
        ConfigError: the file is not there, or not in a run's folder.
        IntegrityError: the checkpoint is damaged or gone.
    """
    spec_path = diagnostics.parent.parent / "worker_spec.json"
    if not (diagnostics.exists() and spec_path.exists()):
        raise ConfigError(
            f"{diagnostics} is not the diagnosis of a run, with worker_spec.json in the folder above",
            hint="give the path that the failed run printed: .../diagnostics/step-N.json",
        )
    recorded = read_json(diagnostics)
    spec = WorkerSpec.model_validate_json(spec_path.read_text(encoding="utf-8"))
    trainer = _restored(spec, recorded["last_checkpoint"])
    first, last = trainer.state.step, recorded["step"] - 1
    skipped = {int(path.stem.removeprefix("step-")) for path in diagnostics.parent.glob("step-*.json")}
    while trainer.state.step < last:
        if trainer.state.step + 1 in skipped:
            trainer.state.step += 1
        else:
            trainer.advance()
    again = len(set(range(first + 1, last + 1)) - skipped)
    return _watched(trainer, spec, recorded, checkpoint=first, again=again)


def _restored(spec: WorkerSpec, step: int) -> Trainer:
    """Return a trainer in one process with the state of a checkpoint; step 0 without one is the start."""
    alone = {"engine": "plain", "world_size": 1, "zero_stage": 0, "monitors": {}}
    spec = spec.model_copy(update={"config": spec.config.model_copy(update=alone)})
    architecture = spec.architecture
    engine = worker.make_engine(spec, worker.device_of(spec))
    checkpoints = Checkpoints(spec.checkpoints, spec.config.checkpoint.keep)
    state = State()
    if step or step in checkpoints.steps():
        state = State(**checkpoints.load(step, engine.optimizer))
        engine.copy_to_weights()
    state.rollbacks = max(state.rollbacks, rollbacks.read(spec.rollbacks), key=len)
    trainer = Trainer(
        config=spec.config,
        engine=engine,
        loader=worker.make_loader(spec, architecture, engine.ranks),
        checkpointer=None,
        state=state,
        callbacks=worker.layer_sampling(spec.config),
        stop_requested=lambda: False,
    )
    trainer.start()
    return trainer


def _watched(trainer: Trainer, spec: WorkerSpec, recorded: dict[str, Any], *, checkpoint: int, again: int) -> Report:
    engine, loader, step = trainer.engine, trainer.loader, trainer.state.step
    for callback in trainer.callbacks:
        callback.before_step(trainer)
    undone, micro_batch = trainer.state.rollbacks, phases.at(loader.phases, step).micro_batch
    batches = [batch.to(engine.ranks.device) for batch in loader.batches(step, undone)]
    ids = loader.ids(step, undone).reshape(-1, micro_batch)
    share = 1.0 / max(sum(batch.targets for batch in batches), 1.0)
    weights = [name for name, parameter in engine.module.named_parameters() if not _finite(parameter)]
    watch, micro_batches = Watch()(engine.module), []
    for number, (batch, samples) in enumerate(zip(batches, ids, strict=True)):
        loss = engine.loss(batch)
        engine.backward(loss * share, last=number + 1 == len(batches))
        mean = float(loss.detach()) / max(batch.targets, 1)
        micro_batches.append(MicroBatch(number % spec.config.world_size, samples.tolist(), batch.targets, mean))
    watch.stop()
    norms = gradient_norms(engine)
    return Report(step + 1, checkpoint, again, micro_batches, norms, weights, watch.output, watch.gradient, recorded)


def gradient_norms(engine: Engine) -> dict[str, float]:
    """Return the L2 norm of the gradients of each group of tensors."""
    squares: dict[str, float] = defaultdict(float)
    for name, parameter in engine.module.named_parameters():
        if parameter.grad is not None:
            squares[group_of(name)] += float(parameter.grad.double().square().sum())
    return {group: math.sqrt(total) for group, total in sorted(squares.items())}


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors with fractions in what a module returned."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return [tensor for part in output for tensor in _tensors(part)] if isinstance(output, tuple | list) else []


def main(arguments: list[str]) -> int:
    """Print the report; return the exit code."""
    try:
        if len(arguments) != 1:
            raise ConfigError("give one file", hint="python -m pipelines.training.replay .../diagnostics/step-N.json")
        print("\n".join(replay(Path(arguments[0])).lines()))
    except IngotError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
