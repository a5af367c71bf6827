"""A plain DeepSpeed script of one rank, run by test_fragments.py: binds, refuses, refreshes, and writes what happened.

Uses three things of Ingot (an optimizer, `attach`, `refresh_weights`) and nothing else, as a user's script would.
Run as `fragments_worker.py OUT` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import refusals
import torch
import torch.distributed as dist
from torch import nn

from models.optim.adamw import AdamW
from models.optim.lamb import Lamb
from pipelines.training.zero_binding import attach, refresh_weights, skip_shared_memory_build


def model() -> nn.Module:
    """Return a small model, equal on every call."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def engine_of(stage: int, optimizer: Callable[[nn.Module], Any] | None = None, **config: Any) -> Any:
    """Return an engine of a ZeRO stage, made by deepspeed.initialize."""
    network = config.pop("network", None) or model()
    made = optimizer(network) if optimizer else Lamb(network.named_parameters(), lr=0.01)
    zero = {"stage": stage, **config.pop("zero", {})}
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
    }
    mpu = settings.pop("mpu", None)
    return deepspeed.initialize(model=network, optimizer=made, config=settings, mpu=mpu)[0]


def train(engine: Any, steps: int) -> list[float]:
    """Take steps on fixed data; returns the losses."""
    losses = []
    data = torch.randn(4, 7, generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(steps):
        loss = engine(data.to(next(engine.module.parameters()).dtype)).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def refreshed(stage: int, **config: Any) -> dict[str, bool]:
    """Load other masters, as a checkpoint does, and see whether the live weights follow and training goes on."""
    engine = engine_of(stage, **config)
    attach(engine)
    train(engine, 2)
    for fragment in engine.basic_optimizer.fragments:
        positions = torch.arange(fragment.start, fragment.start + fragment.numel)
        fragment.master.copy_(positions / 64)
    refresh_weights(engine)
    live = {}
    parameters = dict(engine.module.named_parameters())
    gather = deepspeed.zero.GatheredParameters(list(parameters.values())) if stage == 3 else contextlib.nullcontext()
    with gather:
        for name, parameter in parameters.items():
            live[name] = torch.equal(parameter.detach().float().flatten(), torch.arange(parameter.numel()) / 64)
    losses = train(engine, 2)
    return {**live, "trains": losses[1] < losses[0]}


def half_precision() -> dict[str, list[float]]:
    """Train with bf16 weights and fp32 masters: BF16_Optimizer (stage 1) and the ZeRO optimizers (2, 3)."""
    losses = {}
    for stage in (1, 2, 3):
        extra = {"data_types": {"grad_accum_dtype": "fp32"}} if stage == 1 else {}
        engine = engine_of(
            stage, lambda network: Lamb(network.named_parameters(), lr=0.05), bf16={"enabled": True}, **extra
        )
        attach(engine)
        losses[type(engine.optimizer).__name__ + str(stage)] = train(engine, 12)
    return losses


def by_callable() -> float:
    """Make the optimizer from a function of the parameters, DeepSpeed's other way; returns the loss's fall."""
    engine = deepspeed.initialize(
        model=(network := model()),
        model_parameters=list(network.parameters()),
        optimizer=lambda parameters: AdamW(parameters, lr=0.01),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        },
    )[0]
    attach(engine)
    assert {fragment.name.split(".")[1] for fragment in engine.basic_optimizer.fragments} <= {"weight", "bias"}
    losses = train(engine, 5)
    return losses[0] - losses[-1]


def main() -> None:
    """Run everything and write it down."""
    torch.set_num_threads(1)
    skip_shared_memory_build()
    deepspeed.init_distributed("gloo", verbose=False)
    facts = {
        "refreshed": {f"z{stage}": refreshed(stage) for stage in range(4)},
        "refreshed_offloaded": {
            f"z{stage}": refreshed(stage, zero={"offload_optimizer": {"device": "cpu"}}) for stage in (1, 2, 3)
        },
        "half_precision": half_precision(),
        "by_callable": by_callable(),
        "refusals": refusals.all_of_them(engine_of),
    }
    (Path(sys.argv[1]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
