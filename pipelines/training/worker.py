"""One rank of a pretraining: `python -m pipelines.training.worker JOB.json`, started by `pipelines.core.launcher`.

Ends with the exit code of the error that stopped it, 0 when the model is written, 75 when it was asked to stop.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from models.architectures.config import ArchitectureConfig, count_parameters, flops_per_token
from models.optim import lisa
from pipelines.core import artifact, disk
from pipelines.core.errors import IngotError, NumericError, Preempted
from pipelines.core.launcher import beat
from pipelines.data.shards import ShardReader
from pipelines.training import engine as engines
from pipelines.training import model_export, phases, rollbacks
from pipelines.training.callbacks import (
    Callback,
    Checkpointing,
    LayerSampling,
    Logging,
    Monitoring,
    NonFiniteSteps,
    Validation,
    Work,
)
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.config import PretrainConfig
from pipelines.training.data_loader import DataLoader
from pipelines.training.distributed import Ranks
from pipelines.training.loss_module import make_loss_module, make_objective
from pipelines.training.metrics import MetricsLog, Peak, peak, read_records
from pipelines.training.monitors import registry as monitors
from pipelines.training.optimizers import make_optimizer
from pipelines.training.profiling import opened_profile
from pipelines.training.samples import opened_samples
from pipelines.training.trainer import State, Trainer
from pipelines.training.worker_spec import WorkerSpec


class StopRequest:
    """Remembers SIGTERM and SIGINT; the second one ends the process at once, leaving the older checkpoint."""

    def __init__(self) -> None:
        self.received = False

    def install(self) -> None:
        """Take over both signals of this process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def __call__(self) -> bool:
        """Tell whether a signal has come."""
        return self.received

    def _receive(self, _number: int, _frame: Any) -> None:
        if self.received:
            os._exit(Preempted.exit_code)
        self.received = True


def main(arguments: list[str]) -> int:
    """Run one rank; return its exit code."""
    spec = WorkerSpec.model_validate_json(Path(arguments[0]).read_text(encoding="utf-8"))
    stop = StopRequest()
    stop.install()
    try:
        with disk.explained("what the training writes", spec.scratch):
            pretrain(spec, stop)
    except IngotError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return 0


def pretrain(spec: WorkerSpec, stop: StopRequest) -> None:
    """Train from the newest valid checkpoint, or from the start, to the end, and write the model.

    Raises:
        Preempted: a signal asked for it; the state is saved.
        IntegrityError: checkpoints exist, and none is valid.
        NumericError: too many non-finite steps in a row.
    """
    config = spec.config
    device = device_of(spec)
    architecture = spec.architecture
    engine = make_engine(spec, device)
    beat()  # the first one: until here the launcher allows for imports and for waiting on the other ranks
    ranks = engine.ranks
    norms = [lisa.layer_norms(engine.optimizer.weight_norms())]
    checkpoints = Checkpoints(spec.checkpoints, config.checkpoint.keep)
    saved = checkpoints.load_latest(engine.optimizer, rank=ranks.rank, world=ranks.world)
    if saved is not None:
        engine.copy_to_weights()
    state = State() if saved is None else State(**saved)
    state.rollbacks = max(state.rollbacks, rollbacks.read(spec.rollbacks), key=len)
    own = peak(device, config.precision)
    logging = open_logs(spec, architecture, state, ranks, sum(ranks.gathered(own.flops)))
    try:
        with (
            contextlib.closing(logging),
            opened_samples(spec, state, ranks) as samples,
            opened_profile(spec, ranks) as profiling,
        ):
            trainer = Trainer(
                config=config,
                engine=engine,
                loader=make_loader(spec, architecture, ranks),
                checkpointer=checkpoints,
                state=state,
                callbacks=[*profiling, *callbacks(spec, logging, samples)],
                stop_requested=stop,
            )
            trainer.run()
    except (NumericError, Preempted):
        checkpoints.finish()  # raised on all ranks together: the save in the background is not lost
        raise
    checkpoints.finish()
    norms.append(lisa.layer_norms(engine.optimizer.weight_norms()))
    weights = model_export.gather_weights(engine.optimizer, ranks)
    if ranks.rank == 0:
        _finish(spec, facts(spec, architecture, trainer.state) | growth(*norms), weights, own, checkpoints.fallbacks)
    ranks.barrier()


def make_engine(spec: WorkerSpec, device: torch.device) -> engines.Engine:
    """Return the engine with the weights that training starts from."""
    config, module = spec.config, make_loss_module(spec, device)
    return engines.create(config, module, lambda parameters: make_optimizer(config, parameters), device)


def make_loader(spec: WorkerSpec, architecture: ArchitectureConfig, ranks: Ranks) -> DataLoader:
    """Return what the training reads and is validated on."""
    config = spec.config
    train = ShardReader(spec.data, "train")
    return DataLoader(
        train=train,
        validation=ShardReader(spec.data, "validation"),
        objective=make_objective(config, architecture),
        ranks=ranks,
        seed=config.seed,
        phases=phases.phases_of(config),
        micro_batch_size=config.micro_batch_size,
        validation_sequences=config.validation_sequences,
        mixes=phases.mixes_of(config, train.index),
        objectives=[make_objective(config, architecture, phase=number) for number in range(len(config.phases))],
    )


def layer_sampling(config: PretrainConfig) -> list[Callback]:
    """Return the callback that freezes layers, where LISA is on: the only one that changes what a step computes."""
    return [LayerSampling(config.lisa)] if config.lisa.enabled else []


def callbacks(spec: WorkerSpec, logging: Logging, samples: Sequence[Callback] = ()) -> list[Callback]:
    """Return what is due around the steps of a run, in order: a step that is undone is neither logged nor saved."""
    config = spec.config
    monitoring = [Monitoring(monitors.make(config.monitors), spec.rollbacks)] if config.monitors else []
    return [
        *layer_sampling(config),
        NonFiniteSteps(spec.diagnostics),
        *monitoring,
        Validation(),
        *samples,
        logging,
        Checkpointing(config.checkpoint),
    ]


def open_logs(
    spec: WorkerSpec, architecture: ArchitectureConfig, state: State, ranks: Ranks, peak_flops: float
) -> Logging:
    """Note the attempt, and open the records at the step that training goes on from; files on rank 0 only."""
    work = work_before(spec.config, architecture)
    if ranks.rank != 0:
        return Logging(None, None, work, peak_flops)
    starts = [attempt["resumed_at"] for attempt in read_records(spec.attempts)]
    lines = [json.dumps({"resumed_at": step}) + "\n" for step in (*starts, state.step)]
    artifact.write_text(spec.attempts, "".join(lines))
    metrics, losses = (MetricsLog(path, resume_at=state.step) for path in (spec.metrics, spec.losses))
    return Logging(metrics, losses, work, peak_flops)


def facts(spec: WorkerSpec, architecture: ArchitectureConfig, state: State) -> dict[str, Any]:
    """Return what two runs of the same configuration have in common to the last bit: `training.json`."""
    records = read_records(spec.losses)
    losses = [record["loss"] for record in records]
    return {
        "family": architecture.family,
        "preset": spec.config.preset,
        "parameters": count_parameters(architecture),
        "steps": state.step,
        "tokens": state.tokens,
        "skipped_steps": state.skipped,
        "rollbacks": [asdict(rollback) for rollback in state.rollbacks],
        "final_loss": _json_number(float.fromhex(losses[-1])),
        "validation_loss": state.validation,
        "best_validation_loss": state.best,
        "bits_per_byte": bits_per_byte(spec, state.validation),
        "losses": losses,
        "validations": [{"step": r["step"], "loss": r["validation"]} for r in records if "validation" in r],
    }


def growth(start: list[float], end: list[float]) -> dict[str, Any]:
    """Return the mean weight norm of each layer before and after training, and the growth as sampling weights.

    `layer_importance` is what `pretrain.lisa.measured` takes: layers that this run enlarged more are drawn more often.
    Rounded to nine digits, since another number of ranks sums in another order. Empty where no layer has weights.
    """
    if not start or min(*start, *end) <= 0:
        return {}
    return {
        "layer_norms": {"start": [_rounded(norm) for norm in start], "end": [_rounded(norm) for norm in end]},
        "layer_importance": [_rounded(weight) for weight in lisa.importance(end, start)],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")


def work_before(config: PretrainConfig, architecture: ArchitectureConfig) -> Callable[[int], Work]:
    """Return the function that tells what was done before a step."""
    stretches, packed = phases.phases_of(config), architecture.max_positions

    def work(step: int) -> Work:
        tokens = phases.tokens_by_length(stretches, step, packed)
        flops = sum(count * flops_per_token(architecture, length) for length, count in tokens.items())
        return Work(sum(tokens.values()), flops)

    return work


def bits_per_byte(spec: WorkerSpec, nats_per_token: float | None) -> float | None:
    """Return bits per byte of the validation text, by its mean bytes per token; a decoder's losses only have any.

    A document's start token is asked of nobody, and stands for no text.
    """
    split = spec.index["splits"]["validation"]
    if nats_per_token is None or spec.config.family != "decoder":
        return None
    return nats_per_token / math.log(2) * (split["tokens"] - split["documents"]) / split["bytes"]


def device_of(spec: WorkerSpec) -> torch.device:
    """Choose this rank's device, and make its arithmetic repeatable."""
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    # Nothing here reads memory before writing it; filling it all the same costs 5 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if spec.device == "cpu":
        torch.set_num_threads(spec.config.threads)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _finish(
    spec: WorkerSpec,
    final: dict[str, Any],
    weights: dict[str, torch.Tensor],
    own: Peak,
    fallbacks: int,
) -> None:
    """Write the model, then the observations, and last the facts, whose existence says that all is there."""
    model_export.write_model(spec.model, spec.architecture, weights, spec.export_precision or spec.config.precision)
    model_export.copy_tokenizer(spec.data, spec.model)
    model_export.write_json(spec.observations, _observations(spec, own) | {"checkpoint_fallbacks": fallbacks})
    model_export.write_json(spec.facts, final)


def _observations(spec: WorkerSpec, own: Peak) -> dict[str, Any]:
    records = read_records(spec.metrics)
    rates = sorted(record["tokens_per_s"] for record in records)
    parts = sorted({key for record in records for key in record if key.startswith("time/")})
    return {
        "tokens_per_s": rates[len(rates) // 2],
        "mfu": sorted(record["mfu"] for record in records)[len(records) // 2],
        "peak_flops_per_rank": own.flops,
        "peak_source": own.source,
        "memory_bytes": records[-1]["memory_bytes"],
        "seconds": {part.removeprefix("time/"): round(sum(r.get(part, 0.0) for r in records), 3) for part in parts},
        "resumed_at": [attempt["resumed_at"] for attempt in read_records(spec.attempts)[1:]],
        "device": spec.device,
        "threads_per_rank": spec.config.threads,
    }


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written. The interpreter's own end joins nothing of ours, and a thread that a communication library left
    # behind has aborted it there ("terminate called without an active exception"), which made a failure of a success.
    os._exit(code)
