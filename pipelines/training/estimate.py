"""What a pretraining will take, from its configuration: memory, arithmetic, time, disk; and what would take less.

The time of a step is a sum of three things: arithmetic at a share of the device's peak, gradients, weights and moments
that are moved through memory, and what the ranks exchange. An earlier run tells the peak of its machine and by how
much this sum was wrong there; the factor is applied to the new run, so one of the same shape is told what it took.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pydantic import ValidationError

from models.architectures.config import PRESETS, ArchitectureConfig, count_parameters, flops_per_token
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.core.estimate import Estimate, EstimateContext, Needs, Remedy, Time
from pipelines.training import memory, mixture, peaks, phases, room
from pipelines.training.config import PretrainConfig

_EFFICIENCY = {"cpu": 0.9, "cuda": 0.5}
"""Share of the peak that a training step reaches, the elementwise work between its products included."""
_MEMORY_RATE = {"cpu": 6e9, "cuda": 1.5e12}
"""Bytes a second that a rank moves through memory."""
_EXCHANGE_RATE = {"cpu": 3e9, "cuda": 100e9}
"""Bytes a second that ranks exchange: gloo in one machine, NVLink. Numbers for the CPU here and below are fitted to
what `tests/bench/bench_estimates.py` measured; those for GPUs are assumed."""
_GRADIENT_BYTES = 40
"""Bytes that a pass moves for each parameter: gradients are made, zeroed, added up and put into buffers."""
_OPTIMIZER_BYTES = {"lamb": 44, "adamw": 28, "lars": 32}
"""Bytes that a step of the optimizer moves for each parameter; see `models.optim.sharded_optimizer`."""
_SHARDED_BYTES = 60
"""Bytes that a step of ZeRO 1 to 3 moves for each parameter beside: flat copies, parts, weights brought back."""
_GATHERED_BYTES = 20
"""Bytes that a pass of ZeRO 3 moves for each parameter: weights are gathered in both directions, through a copy."""
_CALL_S = {"cpu": 0.0007, "cuda": 0.0003}
"""Cost of a layer of a forward and backward pass however small it is."""
_START_S = {"plain": 8.0, "deepspeed": 14.0}
"""Imports, process group, building the model."""
_WRITE_RATE = 0.4e9
"""Bytes a second that a checkpoint or a model is written at, hashing included."""
_RECORD_BYTES = 900
"""A line of metrics and one of losses."""
_IDS = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
_LOOKED_AT = 20
"""Earlier runs that are asked for their pace, the closest first."""
_BUSY = ("data", "forward", "backward", "step")


@dataclass(frozen=True)
class Pace:
    """How fast a machine computes for one rank."""

    device: str
    peak_flops: float
    cores: int | None = None
    """Cores that all ranks share; None: enough."""


def estimate_pretrain(config: PretrainConfig, context: EstimateContext) -> Estimate:
    """Return what a pretraining takes; see `pipelines.core.estimate`.

    Raises:
        ConfigError: the model does not fit the tokenizer, or a phase the packed sequences.
    """
    architecture = architecture_of(config, context.fact("vocab_size"), context.fact("sequence_length"))
    machine = context.machine
    held = memory.of_rank(config, architecture, machine.device)
    return Estimate(
        ranks=config.world_size,
        memory=held.device,
        first_bytes=held.first_bytes,
        host_memory=held.host,
        time=_time(config, architecture, context),
        flops=flops(config, architecture),
        disk={
            "checkpoints": room.checkpoint_bytes(config, architecture) * (config.checkpoint.keep + 1),
            "model": 2 * room.model_bytes(config, architecture),
            "metrics": _RECORD_BYTES * config.steps,
        },
        disk_exact=True,
        facts=facts(config, architecture) | _mixed(config, context),
        remedies=remedies(config, architecture, machine.device) if not _needs(config, held).fit(machine) else (),
    )


def architecture_of(config: PretrainConfig, vocab_size: int, sequence_length: int) -> ArchitectureConfig:
    """Return the model for a vocabulary and packed sequences, before there is a tokenizer.

    Raises:
        ConfigError: it cannot be built, or a phase does not fit the sequences.
    """
    try:
        architecture = config.architecture({"vocab_size": vocab_size, "sequence_length": sequence_length, **_IDS})
    except ValidationError as error:
        raise ConfigError(f"pretrain.model does not fit the tokenizer: {error}") from error
    for phase in phases.phases_of(config):
        phases.chunks_a_sequence(phase, sequence_length)
    return architecture


def facts(config: PretrainConfig, architecture: ArchitectureConfig) -> dict[str, Any]:
    """Return what the stages below need to know of the model, and what people ask first."""
    tokens = phases.tokens_by_length(phases.phases_of(config), config.steps, architecture.max_positions)
    return shape_facts(architecture) | {
        "tokens": sum(tokens.values()),
        "checkpoint_bytes": room.checkpoint_bytes(config, architecture),
        "model_bytes": room.model_bytes(config, architecture),
        "dense_bytes": room.model_bytes(config, architecture),
        "forward_flops_per_token": flops_per_token(architecture, architecture.max_positions) / 3,
    }


def _mixed(config: PretrainConfig, context: EstimateContext) -> dict[str, Any]:
    """Return what each phase takes of each source, as far as prepare has counted them.

    Raises:
        ConfigError: a source does not exist, or may not give as much as is asked of it.
    """
    length, counted = context.fact("sequence_length"), context.fact("sources")
    stretches = phases.stretches_of(config, length)
    if not stretches:
        return {}
    if counted is None:
        return {"mixture": []}
    entries = [{"source": name, "sequences": count} for name, count in sorted(counted.items())]
    return {"mixture": mixture.table(stretches, mixture.resolve(stretches, mixture.sources_of(entries)), length)}


def shape_facts(architecture: ArchitectureConfig) -> dict[str, Any]:
    """Return what the stages below need to know of the shape of the model."""
    return {
        "parameters": count_parameters(architecture),
        "layer_parameters": room.layer_parameters(architecture) * architecture.layers,
        "layers": architecture.layers,
        "width": architecture.width,
        "ffn_width": architecture.ffn_width,
    }


def flops(config: PretrainConfig, architecture: ArchitectureConfig) -> float:
    """Return the floating point operations of all steps on all ranks, forward and backward."""
    tokens = phases.tokens_by_length(phases.phases_of(config), config.steps, architecture.max_positions)
    return sum(count * flops_per_token(architecture, length) for length, count in tokens.items())


# ---- time -----------------------------------------------------------------------------------------------------------


def busy_seconds(config: PretrainConfig, architecture: ArchitectureConfig, pace: Pace) -> float:
    """Return the seconds of all steps, without validation, checkpoints and start."""
    samples = {
        phase.number: phase.samples_before(phase.steps) / phase.micro_batch / config.world_size
        for phase in phases.phases_of(config)
    }
    crowded = max(1.0, config.world_size * config.threads / pace.cores) if pace.cores and pace.device == "cpu" else 1.0
    total = 0.0
    for phase in phases.phases_of(config):
        length = phase.sequence_length or architecture.max_positions
        passes = samples[phase.number]
        total += passes * pass_seconds(config, architecture, pace, phase.micro_batch, length)
        total += phase.steps * update_seconds(config, architecture, pace)
    return total * crowded


def pass_seconds(
    config: PretrainConfig, architecture: ArchitectureConfig, pace: Pace, sequences: int, length: int
) -> float:
    """Return the seconds of one forward and backward pass of one rank over a micro batch."""
    tokens, every = sequences * length, count_parameters(architecture)
    operations = tokens * flops_per_token(architecture, length)
    # The output matrix serves targets only, and LISA's frozen layers get no gradients of their weights.
    operations -= 6.0 * (1.0 - memory.target_share(config)) * tokens * architecture.vocab_size * architecture.width
    operations -= 2.0 * (every - room.active_parameters(config, architecture)) * tokens
    if config.activation_checkpointing == "full":  # the forward pass of the layers once more: a third of the operations
        head = 6.0 * architecture.vocab_size * architecture.width
        operations += tokens * (flops_per_token(architecture, length) - head) / 3
    stage = config.zero_stage if config.engine == "deepspeed" else 0
    moved = (_GRADIENT_BYTES + (_GATHERED_BYTES if stage == 3 else 0)) * every
    # Gradients are reduced in every pass, with stage 3 weights gathered twice; before, once a step.
    exchanged = {0: 0, 1: 0, 2: 2, 3: 3}[stage] * _received(config, memory.FP32 * every)
    return (
        operations / (_EFFICIENCY[pace.device] * pace.peak_flops)
        + moved / _MEMORY_RATE[pace.device]
        + exchanged / _EXCHANGE_RATE[pace.device]
        + _CALL_S[pace.device] * (architecture.layers + 2)
    )


def update_seconds(config: PretrainConfig, architecture: ArchitectureConfig, pace: Pace) -> float:
    """Return the seconds of an optimizer step of one rank, with what is exchanged once a step."""
    every, active = count_parameters(architecture), room.active_parameters(config, architecture)
    stage = config.zero_stage if config.engine == "deepspeed" else 0
    moved = _OPTIMIZER_BYTES[config.optimizer.name] * active / (config.world_size if stage else 1)
    moved += _SHARDED_BYTES * every if stage else 0
    exchanged = {0: 2, 1: 3, 2: 1, 3: 0}[stage] * _received(config, memory.FP32 * every)
    return moved / _MEMORY_RATE[pace.device] + exchanged / _EXCHANGE_RATE[pace.device]


def _received(config: PretrainConfig, size: float) -> float:
    """Return the bytes that a rank receives when an array of `size` bytes is gathered or scattered."""
    return size * (config.world_size - 1) / config.world_size


def _time(config: PretrainConfig, architecture: ArchitectureConfig, context: EstimateContext) -> Time:
    machine = context.machine
    earlier = map(_earlier, islice(context.history, _LOOKED_AT))
    known = next((each for each in earlier if each is not None and each.fits(config, machine.device)), None)
    if machine.peak_flops is not None:
        peak, source, basis = machine.peak_flops, "stated", "compute.peak_tflops"
        known = None
    elif known is not None:
        peak, source, basis = (
            known.peak_flops,
            "scaled",
            f"scaled from {known.name} on {known.peak_flops / 1e9:,.0f} GFLOP/s",
        )
    else:
        peak, told = peaks.stated(machine.device, config.precision, gpu=machine.gpu, threads=config.threads)
        source, basis = "stated", f"no earlier run on this kind of device; {told}"
    pace = Pace(machine.device, peak, machine.cores)
    factor = 1.0
    if known is not None:
        factor = known.busy_s / busy_seconds(known.config, known.architecture, pace)
        if _pace_of(known.config, known.architecture) == _pace_of(config, architecture):
            source, basis = "measured", f"{known.name}, of the same shape"
    busy = factor * busy_seconds(config, architecture, pace)
    other = factor * _validation_seconds(config, architecture, pace) + _start_and_files(config, architecture)
    return Time(busy + other, source, basis)  # type: ignore[arg-type]


def _validation_seconds(config: PretrainConfig, architecture: ArchitectureConfig, pace: Pace) -> float:
    """Return the seconds of all validations: forward passes, each a third of a training pass."""
    times = -(-config.steps // config.validate_every)
    passes = -(-config.validation_sequences // (config.micro_batch_size * config.world_size))
    one = pass_seconds(config, architecture, pace, config.micro_batch_size, architecture.max_positions)
    return times * passes * one / 3


def _start_and_files(config: PretrainConfig, architecture: ArchitectureConfig) -> float:
    """Return the seconds of imports, and of the last checkpoint and the model; others are written beside training."""
    written = room.checkpoint_bytes(config, architecture) + 2 * room.model_bytes(config, architecture)
    return _START_S[config.engine] + written / _WRITE_RATE


@dataclass(frozen=True)
class _Earlier:
    """A pretraining that was measured."""

    name: str
    config: PretrainConfig
    architecture: ArchitectureConfig
    device: str
    peak_flops: float
    busy_s: float

    def fits(self, config: PretrainConfig, device: str) -> bool:
        """Tell whether its peak is one of the same arithmetic."""
        same_threads = device == "cuda" or self.config.threads == config.threads
        return self.device == device and self.config.precision == config.precision and same_threads


def _earlier(found: Artifact) -> _Earlier | None:
    """Return what an earlier artifact has measured; None where it has nothing that this checkout can read."""
    try:
        observed, stored = found.read_json("observations.json"), found.read_json("model/config.json")
        config = PretrainConfig.model_validate(
            found.manifest.identity["config"] | {"threads": observed["threads_per_rank"]}
        )
        architecture = architecture_of(config, stored["vocab_size"], stored["max_position_embeddings"])
        return _Earlier(
            name=f"pretrain {found.manifest.fingerprint[:8]}",
            config=config,
            architecture=architecture,
            device=observed["device"],
            peak_flops=observed["peak_flops_per_rank"],
            busy_s=sum(observed["seconds"][part] for part in _BUSY),
        )
    except (OSError, KeyError, ValueError, TypeError, ConfigError):
        return None  # of another version, or damaged: there is no need of it


def _pace_of(config: PretrainConfig, architecture: ArchitectureConfig) -> dict[str, Any]:
    """Return everything that the time of a step depends on."""
    names = {"engine", "zero_stage", "world_size", "threads", "offload", "micro_batch_size", "batch_size", "precision",
             "compile", "loss_chunk", "activation_checkpointing", "objective", "lisa"}  # fmt: skip
    shown = config.model_dump(mode="json", include=names)
    stretches = [(p.micro_batch, p.sequence_length, p.batch_schedule) for p in phases.phases_of(config)]
    rule = (config.optimizer.name, config.optimizer.compiled)
    return {**shown, "phases": stretches if config.phases else [], "rule": rule, "model": architecture.model_dump()}


# ---- what would take less memory ------------------------------------------------------------------------------------

_LEANEST = {"micro_batch_size": 1, "loss_chunk": 1024, "activation_checkpointing": "full"}
_MILDER: tuple[Mapping[str, Any], ...] = (
    {"micro_batch_size": 1},
    {"loss_chunk": 1024},
    {"activation_checkpointing": "selective"},
    {"activation_checkpointing": "full"},
    {"zero_stage": 3},
    {"zero_stage": 3, **_LEANEST},
    {"zero_stage": 3, "precision": "bf16", **_LEANEST},
    {"zero_stage": 3, "lisa": {"layers": 2}, **_LEANEST},
    {"zero_stage": 3, "precision": "bf16", "offload": True, **_LEANEST},
    {"world_size": 1, "zero_stage": 2, **_LEANEST},
    {"world_size": 1, "zero_stage": 2, "precision": "bf16", **_LEANEST},
)
"""Other ways to hold the same model, the mildest first."""
_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)


def remedies(config: PretrainConfig, architecture: ArchitectureConfig, device: str) -> list[Remedy]:
    """Return settings and what they would hold: the same model otherwise, over more ranks, then smaller models."""
    smaller = [{"preset": name} for name in reversed(PRESETS)]
    over_ranks = [_spread(config, ranks) for ranks in _RANKS if ranks > config.world_size and device == "cuda"]
    tried = (*_MILDER, *over_ranks, *(option for each in smaller for option in (each, {**each, **_LEANEST})))
    now = memory.of_rank(config, architecture, device).device_bytes
    found = (_remedy(config, architecture, device, changes) for changes in tried)
    less = [remedy for remedy in found if remedy is not None and remedy.needs.rank_bytes < now]
    return list({remedy.settings: remedy for remedy in less}.values())


def _spread(config: PretrainConfig, ranks: int) -> dict[str, Any]:
    """Return the settings of ZeRO 3 over so many ranks, with a sequence for each at least."""
    return {"world_size": ranks, "zero_stage": 3, "batch_size": max(config.batch_size, ranks), **_LEANEST}


def _needs(config: PretrainConfig, held: memory.Memory) -> Needs:
    return Needs(config.world_size, held.device_bytes, held.first_bytes, held.host_bytes)


def _remedy(
    config: PretrainConfig, architecture: ArchitectureConfig, device: str, changes: Mapping[str, Any]
) -> Remedy | None:
    """Return the memory under changed settings; None where they change nothing or cannot be."""
    given = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    news = {key: value for key, value in changes.items() if getattr(config, key) != value}
    try:
        changed = PretrainConfig.model_validate(given | news)
        model = architecture_of(changed, architecture.vocab_size, architecture.max_positions)
    except (ValueError, ConfigError):
        return None
    held = memory.of_rank(changed, model, device)
    settings = tuple(_settings("pretrain", news))
    return Remedy(settings, _needs(changed, held)) if settings else None


def _settings(path: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield values as the command line takes them."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _settings(f"{path}.{key}", value)
        else:
            yield f"{path}.{key}={str(value).lower() if isinstance(value, bool) else value}"
