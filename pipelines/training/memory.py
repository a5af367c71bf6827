"""The memory that a rank of a training holds, from its configuration: what DeepSpeed, torch and this trainer allocate.

P is the number of parameters, N the number of ranks. In float32 a rank holds, in bytes of one weight:

                     ZeRO 0     1          2          3              plain
    weights          4          4          4          8 + 4/N        4       in bf16 half
    master weights   0          4/N        4/N        4/N            0       the rank's part, always in float32
    gradients        4          4 + 4/N    4/N        4/N            4
    optimizer state  8          8/N        8/N        8/N            8       lars: half; LISA: of the active layers
    buffers          4          0          4          8              0       at most two billion bytes each

Offload moves masters and moments to the CPU, and adds the gradients of the part there and a buffer on either side.
Every figure is of what DeepSpeed 0.19 does: ZeRO 1 to 3 keep masters beside the weights in float32 too. ZeRO 3 gathers
weights to compute, through a copy, and keeps up to a billion of them, so it saves nothing for models below that.
`tests/bench/bench_estimates.py` compares all this with what ranks really held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models.architectures.config import ArchitectureConfig, count_parameters
from models.objectives import registry as objectives
from pipelines.training import phases
from pipelines.training.config import PretrainConfig
from pipelines.training.room import MOMENTS, active_parameters, checkpoint_bytes, layer_parameters

FP32, BF16 = 4, 2
LARGEST_BUCKET = 500_000_000
"""Elements of a communication buffer, at most; smaller models have smaller ones."""
_LIVE_WEIGHTS = 1_000_000_000
"""Gathered weights that ZeRO 3 keeps at most (DeepSpeed's `stage3_max_live_parameters`)."""
_PROCESS = {"plain": 550_000_000, "deepspeed": 660_000_000}
"""Python, torch and the libraries of an engine: resident memory of a rank on a CPU, measured on a model of no size."""
_CUDA_CONTEXT = 600_000_000
"""What a process takes of a GPU before it has a tensor."""
_HOST_PROCESS = 3_000_000_000
"""Resident memory of a rank that computes on a GPU: libraries, pinned buffers."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak, by what they are for."""

    device: Mapping[str, int]
    """On the device that computes."""
    host: Mapping[str, int]
    """In the CPU's memory beside a GPU; empty where the CPU computes."""
    first_bytes: int = 0
    """What rank 0 holds on the device beyond that, when it gathers the trained weights to write them."""

    @property
    def most_bytes(self) -> int:
        """Of the rank that holds most, on the device."""
        return self.device_bytes + self.first_bytes

    @property
    def device_bytes(self) -> int:
        """All of the device's."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All of the CPU's beside a GPU."""
        return sum(self.host.values())


def of_rank(config: PretrainConfig, architecture: ArchitectureConfig, device: str) -> Memory:
    """Return the memory of the rank that holds most.

    Args:
        config: the training.
        architecture: its model.
        device: cpu or cuda.
    """
    states, offloaded = state_bytes(config, architecture)
    micro_batches = [
        (phase.micro_batch, phase.sequence_length or architecture.max_positions) for phase in phases.phases_of(config)
    ]
    largest = max(micro_batches, key=lambda each: sum(pass_bytes(config, architecture, *each).values()))
    computing = pass_bytes(config, architecture, *largest)
    snapshot, gathered = _snapshot_bytes(config, architecture), FP32 * count_parameters(architecture)
    if device == "cpu":
        training = computing | {"checkpoint being written": snapshot}
        beyond = max(0, gathered - sum(training.values()))  # those are gone when the weights are gathered
        return Memory({"process": _PROCESS[config.engine]} | _added(states, offloaded) | training, {}, beyond)
    written = {"checkpoint or model being written": max(snapshot, gathered // config.world_size)}
    host = {"process": _HOST_PROCESS} | offloaded | written
    return Memory({"process": _CUDA_CONTEXT} | states | computing, host)


def state_bytes(config: PretrainConfig, architecture: ArchitectureConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes of weights, gradients, optimizer state and buffers of a rank: (on the device, offloaded)."""
    every, ranks = count_parameters(architecture), config.world_size
    stage = config.zero_stage if config.engine == "deepspeed" else 0
    live = FP32 if config.precision == "fp32" or config.engine == "plain" else BF16
    moments = FP32 * MOMENTS[config.optimizer.name] * active_parameters(config, architecture)
    if stage == 0:
        trained = active_parameters(config, architecture) if config.engine == "plain" else every
        buffers = 0 if config.engine == "plain" else min(every, LARGEST_BUCKET) * FP32
        return {
            "weights": live * every,
            "gradients": FP32 * trained,
            "optimizer state": moments,
            "buffers": buffers,
        }, {}
    part = -(-every // ranks)
    bucket = min(every, LARGEST_BUCKET)
    states = {
        "weights": live * (every if stage < 3 else part + 2 * min(every, _LIVE_WEIGHTS)),
        "gradients": FP32 * (part + (every if stage == 1 else 0)),
        "buffers": live * bucket * {1: 0, 2: 1, 3: 2}[stage],
    }
    sharded = {"master weights": FP32 * part, "optimizer state": -(-moments // ranks)}
    if not config.offload:
        return states | sharded, {}
    # Gradients cross over tensor by tensor, from a buffer on either side into pinned memory of the CPU.
    crossing = FP32 * max(architecture.vocab_size, architecture.ffn_width) * architecture.width
    states["buffers"] += crossing
    return states, sharded | {"gradients": FP32 * part, "buffers": crossing}


def pass_bytes(config: PretrainConfig, architecture: ArchitectureConfig, sequences: int, length: int) -> dict[str, int]:
    """Return the bytes that the forward pass of a micro batch leaves for the backward pass.

    The logits of its targets count three times: as such, as their log-softmax, and as the gradient of either.
    """
    targets = target_share(config) * sequences * length
    if config.loss_chunk is not None:
        targets = min(targets, config.loss_chunk)
    return {
        "activations": activation_bytes(config, architecture, sequences, length),
        "logits": round(3 * FP32 * targets * architecture.vocab_size),
    }


def activation_bytes(config: PretrainConfig, architecture: ArchitectureConfig, sequences: int, length: int) -> int:
    """Return the bytes that autograd keeps of the layers, exact to a percent in float32 (a test counts them).

    With activation checkpointing: what the layers keep, and one of them in full, as it is computed again. The encoder's
    local layers hold a mask each.
    """
    size, layers = _size(config), architecture.layers
    full = sequences * length * _whole_layer_bytes(config, architecture)
    kept = sequences * length * _kept_layer_bytes(config, architecture)
    again = config.activation_checkpointing != "none"
    local = 0 if architecture.family == "decoder" else layers - -(-layers // architecture.global_every)
    masks = size * sequences * length * length * (min(local, 1) if again else local)
    return (
        (kept * layers + full if again else full * layers) + masks + sequences * length * 3 * size * architecture.width
    )


def _whole_layer_bytes(config: PretrainConfig, architecture: ArchitectureConfig) -> int:
    """Return what a layer keeps of a token where nothing is computed again.

    Queries and outputs of attention, keys and values, four arrays as wide as the feed-forward, and those as wide as the
    model around the norms.
    """
    width, attention = architecture.width, architecture.heads * architecture.head_size
    keys = architecture.key_heads * architecture.head_size
    decoder, half, size = architecture.family == "decoder", config.precision == "bf16", _size(config)
    around_norms = (16 if half else 24) if decoder else 4 * size
    # The encoder keeps the projection that its queries, keys and values are cut from beside the turned ones.
    projected = size * (2 * attention + 2 * keys) if decoder else size * 6 * attention
    of_token = around_norms * width + projected + size * 4 * architecture.ffn_width + 4 * (architecture.heads + 4)
    return round(1.5 * of_token) if half and config.engine == "plain" else of_token  # autocast keeps what it converted


def _kept_layer_bytes(config: PretrainConfig, architecture: ArchitectureConfig) -> int:
    """Return what a layer keeps of a token that computes the rest again: its input, or also what products made."""
    size, width, heads = _size(config), architecture.width, architecture.heads
    if config.activation_checkpointing == "full":
        return size * width
    projected = heads + 2 * architecture.key_heads if architecture.family == "decoder" else 3 * heads
    products = 2 * width + (heads + projected) * architecture.head_size + 2 * architecture.ffn_width
    return size * (width + products) + FP32 * heads  # the last: what attention sums over


def _size(config: PretrainConfig) -> int:
    return BF16 if config.precision == "bf16" else FP32


def target_share(config: PretrainConfig) -> float:
    """Return the share of the tokens that the objective asks for, in the phase where it asks for most."""
    objective = objectives.get(config.objective)
    settings = [config.objective_settings_of(phase) for phase in range(max(1, len(config.phases)))]
    return max(objective.target_share(objective.Config.model_validate(each)) for each in settings)


def largest_layer(architecture: ArchitectureConfig) -> int:
    """Return the parameters of the largest module that ZeRO 3 gathers: a layer, or a token matrix."""
    return max(layer_parameters(architecture), architecture.vocab_size * architecture.width)


def _snapshot_bytes(config: PretrainConfig, architecture: ArchitectureConfig) -> int:
    """Return the copy of its share that a rank writes while it trains on; with ZeRO 0 rank 0 writes all."""
    sharded = config.engine == "deepspeed" and config.zero_stage > 0
    return -(-checkpoint_bytes(config, architecture) // (config.world_size if sharded else 1))


def _added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in (*one, *(n for n in other if n not in one))}
