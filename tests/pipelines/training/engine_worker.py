"""One process that asks for engines and writes what it was given or refused: `engine_worker.py OUT.json`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from models.optim.lamb import Lamb
from pipelines.core.errors import IngotError
from pipelines.training import engine
from pipelines.training.config import PretrainConfig
from pipelines.training.distributed import Ranks

SETTINGS: dict[str, Any] = {"world_size": 1, "batch_size": 6, "micro_batch_size": 2, "zero_stage": 2}


class Sum(nn.Module):
    """A model whose loss is a product of input and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 3))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (inputs @ self.weight).sum() * targets.sum()


def refusal(call: Any) -> str | None:
    try:
        call()
    except IngotError as error:
        return error.message
    return None


def main() -> None:
    config = PretrainConfig.model_validate(SETTINGS)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    module = Sum()
    found: dict[str, Any] = {"use_cpu": refusal(lambda: engine.prepare(module, Lamb(module.parameters()), config))}
    made = engine.DeepSpeedEngine(module, Lamb, config, torch.device("cpu"))
    found["type"] = type(made._engine).__name__
    found["shm_comm"] = "deepspeed_shm_comm" in sys.modules or engine_has_shm()
    listening = [c for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    found["listens_on"] = sorted({c.laddr.ip for c in listening})
    found["store_listens"] = int(os.environ["MASTER_PORT"]) in {c.laddr.port for c in listening}
    found["clipping"] = made._engine.gradient_clipping()
    for name, change in {
        "world": {"world_size": 2, "batch_size": 12},
        "stage": {"zero_stage": 3},
        "batch": {"batch_size": 12},
        "same": {},
    }.items():
        other = PretrainConfig.model_validate({**SETTINGS, **change})
        found[name] = refusal(lambda other=other: engine.check(made._engine, made.ranks, other))
    found["no_engine"] = refusal(lambda: engine.check(Sum(), Ranks(0, 1, torch.device("cpu")), config))
    Path(sys.argv[1]).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def engine_has_shm() -> bool:
    import deepspeed

    return bool(deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"])


if __name__ == "__main__":
    main()
