"""Real DeepSpeed engines that `attach` must refuse, each made on all ranks; fragments_worker.py runs them.

Engines that split the model over ranks come last: DeepSpeed keeps their process groups in module globals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import PipelineModule
from deepspeed.utils import groups
from torch import nn

from models.optim.lamb import Lamb
from pipelines.training.zero_binding import attach

MakeEngine = Callable[..., Any]


def said(engine: Any) -> str:
    """Return what attach says; after it, all ranks must still be able to talk to each other."""
    message = "attached"
    try:
        attach(engine)
    except Exception as error:  # noqa: BLE001 - the test looks at its type and text
        message = f"{type(error).__name__}: {error}"
    dist.barrier()
    return message


def all_of_them(engine_of: MakeEngine) -> dict[str, str]:
    """Try everything that must be refused; returns what was said."""
    return {
        "foreign optimizer": said(engine_of(1, lambda network: torch.optim.AdamW(network.parameters()))),
        "round robin": said(engine_of(1, zero={"round_robin_gradients": True})),
        "clipped twice": said(engine_of(2, clipping, gradient_clipping=1.0)),
        "clipped twice on rank 1": said(engine_of(2, clipping if dist.get_rank() else None, gradient_clipping=1.0)),
        "bf16 without ZeRO": said(engine_of(0, bf16={"enabled": True})),
        "half-precision masters": said(engine_of(2, bf16=HALF_MASTERS)),
        "shifted address": said(shifted(engine_of)),
        "swapped addresses": said(swapped(engine_of)),
        **{f"no {name} in ZeRO-{stage}": said(lacking(engine_of, stage, name)) for stage, name in LOST},
        "experts": said(experts(engine_of)),
        "pipeline": said(pipeline()),
        "Megatron": said(engine_of(1, mpu=TensorParallel())),
        "AutoTP": said(tensor_parallel(engine_of)),
        "Ulysses": said(sequence_parallel(engine_of)),
    }


def clipping(network: nn.Module) -> Lamb:
    """Return an optimizer that clips by itself."""
    return Lamb(network.named_parameters(), max_grad_norm=1.0)


HALF_MASTERS = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
LOST = [(1, "single_partition_of_fp32_groups"), (2, "real_dp_process_group"), (3, "grad_position")]


def lacking(engine_of: MakeEngine, stage: int, name: str) -> Any:
    """Return an engine that lacks an attribute on one rank; the other must not be left waiting."""
    engine = engine_of(stage)
    if dist.get_rank() == 0:
        delattr(engine.optimizer, name)
    return engine


def shifted(engine_of: MakeEngine) -> Any:
    """Return an engine with an address that is off by one."""
    engine = engine_of(2)
    mapped = [parameter for parameter in engine.module.parameters() if parameter._hp_mapping is not None]
    mapped[0]._hp_mapping.hp_fragment_address.start += 1
    mapped[0]._hp_mapping.hp_fragment_address.numel -= 1
    return engine


def swapped(engine_of: MakeEngine) -> Any:
    """Return a ZeRO-3 engine in which two tensors of equal size have each other's address."""
    engine = engine_of(3, network=nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)))
    zero = engine.optimizer
    one, other = (zero.get_param_id(parameter) for parameter in engine.module.parameters())
    zero.grad_position[one], zero.grad_position[other] = zero.grad_position[other], zero.grad_position[one]
    return engine


def experts(engine_of: MakeEngine) -> Any:
    """Return an engine of two experts, one on each rank."""
    network = nn.Sequential(nn.Linear(7, 5), MoE(5, nn.Linear(5, 5), num_experts=2, ep_size=2, k=1))

    def optimizer(module: nn.Module) -> Lamb:
        group = {"params": list(module.parameters()), "name": "all"}
        return Lamb(split_params_into_different_moe_groups_for_optimizer(group), lr=0.01)

    return engine_of(2, optimizer, network=network)


def pipeline() -> Any:
    """Return a pipeline engine of two stages, one on each rank."""
    layers = PipelineModule([nn.Linear(7, 5), nn.Linear(5, 3)], num_stages=2, partition_method="uniform")
    config = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True}
    optimizer = Lamb(layers.named_parameters(), lr=0.01)
    return deepspeed.initialize(model=layers, optimizer=optimizer, config=config)[0]


class TensorParallel:
    """Megatron's side of DeepSpeed: both ranks are one tensor-parallel group, each is its own data-parallel group."""

    def __init__(self) -> None:
        self._model = dist.new_group([0, 1])
        self._data = [dist.new_group([rank]) for rank in (0, 1)][dist.get_rank()]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return 2

    def get_model_parallel_group(self) -> Any:
        return self._model

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> Any:
        return self._data


def tensor_parallel(engine_of: MakeEngine) -> Any:
    """Return an engine whose linear layers DeepSpeed itself splits over both ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    groups.mpu = None
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 32}
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, **sizes)
    return engine_of(1, network=LlamaForCausalLM(config), tensor_parallel={"autotp_size": 2})


def sequence_parallel(engine_of: MakeEngine) -> Any:
    """Return an engine whose ranks hold parts of the same sequences."""
    groups.mpu = None
    return engine_of(2, sequence_parallel_size=2, data_parallel_size=1)
