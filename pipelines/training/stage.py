"""The `pretrain` stage: from packed tokens to a trained model, by N ranks that may be killed at any time.

The ranks work in the scratch folder, which is the same at every attempt, so that resuming happens by itself; only a
finished run is copied to the artifact.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from models.architectures.config import ArchitectureConfig
from pipelines.core import artifact, program, quantity
from pipelines.core.artifact import Artifact, read_json
from pipelines.core.compute import resolve_device
from pipelines.core.errors import ConfigError
from pipelines.core.launcher import launch
from pipelines.core.node_files import Workplace
from pipelines.core.stage import Progress, StageContext, Summary
from pipelines.training import phases, room
from pipelines.training.config import PretrainConfig
from pipelines.training.metrics import Record, Tail
from pipelines.training.worker_spec import WorkerSpec

SPEC = "worker_spec.json"
"""What the ranks are told, in the folder that they work in."""
_FOLLOW_S = 0.25
"""Seconds between looks at the metrics file."""


def run(config: PretrainConfig, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> Summary:
    """Train the model and lay out the artifact; see `pipelines.core.stage`.

    Raises:
        ConfigError: the model cannot be built for this tokenizer, or the device is not there.
        DiskFullError: the disk has no room for the checkpoints.
        Preempted, NumericError, TransientError, IntegrityError: as the ranks ended.
    """
    spec = make_worker_spec(config, inputs["prepare"], context, inputs.get("init_weights"))
    room.check(spec)
    train(spec, context)
    shutil.copytree(spec.model, out_dir / "model")
    for path in (spec.facts, spec.metrics, spec.observations, *([spec.samples] if config.samples else [])):
        shutil.copyfile(path, out_dir / path.name)
    if config.profile is not None and spec.profile.exists():  # not where an earlier attempt was stopped in the window
        shutil.copytree(spec.profile, out_dir / spec.profile.name)
    return summary(out_dir) | _descent(inputs.get("init_weights"))


def make_worker_spec(
    config: PretrainConfig, prepared: Artifact, context: StageContext, fetched: Artifact | None = None
) -> WorkerSpec:
    """Return what to tell the ranks, after checking what only the data, the weights and the machine can tell.

    Args:
        config: what to train.
        prepared: artifact of the prepare stage.
        context: of the stage.
        fetched: artifact of the fetch stage with the weights to start from; None starts from random ones.

    Raises:
        ConfigError: naming the value that does not fit.
    """
    index = prepared.read_json("index.json")
    try:
        architecture = config.architecture(index)
    except ValueError as error:
        raise ConfigError(f"pretrain.model does not fit the tokenizer: {error}") from error
    for phase in phases.phases_of(config):
        phases.chunks_a_sequence(phase, index["sequence_length"])
    phases.mixes_of(config, index)
    device = resolve_device(context.compute.device, ranks=config.world_size // context.compute.node_count)
    weights = _checked_start(architecture, fetched, prepared)
    context.scratch.mkdir(parents=True, exist_ok=True)
    return WorkerSpec(
        config=config,
        index=index,
        data=prepared.path,
        scratch=context.scratch,
        init_weights=weights,
        device=device,
    )


def train(spec: WorkerSpec, context: StageContext) -> None:
    """Bring the training in `spec.scratch` to its end, from wherever an earlier attempt has left it.

    Raises:
        Preempted, NumericError, TransientError, IntegrityError: as the ranks ended.
    """
    write_spec(spec)
    if not spec.facts.exists():
        _launch(spec, context)


def environment(spec: WorkerSpec) -> dict[str, str]:
    """Return the variables of a rank: threads, device, and what makes its arithmetic repeatable."""
    return {
        "PYTHONPATH": program.environment()["PYTHONPATH"],
        "OMP_NUM_THREADS": str(spec.config.threads),
        "MKL_NUM_THREADS": str(spec.config.threads),
        "DS_ACCELERATOR": spec.device,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
    }


def summary(out_dir: Path) -> Summary:
    """Return the headline numbers of a finished artifact folder."""
    facts = read_json(out_dir / "training.json")
    observed = read_json(out_dir / "observations.json")
    names = ("family", "preset", "parameters", "steps", "tokens", "validation_loss", "skipped_steps")
    # `bits_per_byte` alone is that of the test split, which only an evaluation measures.
    return {name: facts[name] for name in names} | {
        "validation_bits_per_byte": facts["bits_per_byte"],
        "tokens_per_s": observed["tokens_per_s"],
    }


def progress(record: Record, total: int, node: str, seconds_per_step: float | None) -> Progress:
    """Return one record as a line for people and numbers for MLflow."""
    loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
    parts = [f"loss {loss}", f"{record['tokens_per_s']:,.0f} tokens/s"]
    if "val/loss" in record:
        parts.insert(1, f"validation {record['val/loss']:.4f}")
    if seconds_per_step is not None:
        parts.append(f"{quantity.duration(seconds_per_step * (total - record['step']))} left")
    numbers = {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
    return Progress(node, record["step"], total, "steps", ", ".join(parts), numbers)


def _checked_start(architecture: ArchitectureConfig, fetched: Artifact | None, prepared: Artifact) -> Path | None:
    if fetched is None:
        return None
    from pipelines.training import init_weights

    init_weights.check(architecture, fetched.path / "model", prepared.path / "tokenizer")
    return fetched.path / "model"


def _descent(fetched: Artifact | None) -> Summary:
    """Return which model the training started from, for tables and lineage."""
    if fetched is None:
        return {}
    return {"init_from": fetched.manifest.summary["source"], "init_weights": fetched.manifest.summary["weights"]}


def write_spec(spec: WorkerSpec) -> None:
    """Write the file; results of another one in the same folder (other ranks, say) do not count as this one's."""
    path, text = spec.scratch / SPEC, spec.model_dump_json(indent=1)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        spec.facts.unlink(missing_ok=True)
    artifact.write_text(path, text)


def _launch(spec: WorkerSpec, context: StageContext) -> None:
    follow = _Follower(spec, context)
    compute = context.compute
    launch(
        program.command("pipelines.training.worker", str(spec.scratch / SPEC)),
        world_size=spec.config.world_size,
        nodes=compute.node_count,
        node_timeout_s=compute.node_timeout_s,
        workplace=Workplace(spec.scratch, context.store, (SPEC, spec.rollbacks.name)),
        log_dir=spec.logs,
        env=environment(spec),
        heartbeat_timeout_s=compute.heartbeat_timeout_s,
        grace_s=compute.grace_s,
        on_poll=follow,
    )
    follow.report()


class _Follower:
    """Reports what appears in the metrics file."""

    def __init__(self, spec: WorkerSpec, context: StageContext) -> None:
        self._tail = Tail(spec.metrics)
        self._context = context
        self._total = spec.config.steps
        self._next = 0.0
        self._first: tuple[int, float] | None = None

    def __call__(self) -> None:
        """Look, but not at every poll of the launcher."""
        if time.monotonic() >= self._next:
            self.report()
            self._next = time.monotonic() + _FOLLOW_S

    def report(self) -> None:
        """Report every new record."""
        for record in self._tail.new_records():
            self._context.report(progress(record, self._total, self._context.node, self._pace(record["step"])))

    def _pace(self, step: int) -> float | None:
        """Return the seconds per step of this attempt, validation and checkpoints included."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
            return None
        first_step, first_time = self._first
        return (now - first_time) / max(step - first_step, 1)
