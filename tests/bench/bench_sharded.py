"""Exact-sharded LAMB against DeepSpeed with torch's AdamW: whole training steps at the same ZeRO stage, turn by turn.

    python tests/bench/bench_sharded.py [--preset 4m] [--ranks 2] [--zero 2] [--rounds 12]

Both engines live in the same ranks (one thread each) and train the same model on the same batch; a ratio is the median
over rounds of LAMB's step over AdamW's in the same round. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig, preset
from models.objectives.causal import next_tokens
from models.optim.lamb import Lamb
from pipelines.core.launcher import launch
from pipelines.training.data_loader import Batch
from pipelines.training.loss_module import LossModule
from pipelines.training.zero_binding import attach, skip_shared_memory_build

VOCABULARY, LENGTH, BATCH = 4096, 256, 4
IDS = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}


def engine_step(arguments: argparse.Namespace, make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[], float]:
    """Return a training step of a DeepSpeed engine, which gives its seconds."""
    import deepspeed

    shape = preset("decoder", arguments.preset).model_dump()
    config = ArchitectureConfig(**shape, vocab_size=VOCABULARY, max_positions=LENGTH, **IDS)
    objective = LossModule(build(config, seed=0))
    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": arguments.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=objective, optimizer=make(objective.named_parameters()), config=settings)
    if isinstance(engine.basic_optimizer, Lamb):
        attach(engine)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    tokens = torch.randint(4, VOCABULARY, (BATCH, LENGTH), generator=generator).numpy()
    batch = Batch.of(tokens, next_tokens(tokens, bos_id=0, pad_id=2), 2)

    def step() -> float:
        torch.distributed.barrier()
        started = time.perf_counter()
        engine.backward(engine(batch.inputs_BT, batch.targets_BT) / batch.targets)
        engine.step()
        return time.perf_counter() - started

    return step


def work(arguments: argparse.Namespace) -> None:
    """Run one rank; rank 0 prints."""
    import deepspeed

    torch.set_num_threads(1)
    skip_shared_memory_build()
    deepspeed.init_distributed("gloo", verbose=False)
    steps = {
        "AdamW": engine_step(arguments, lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-4)),
        "LAMB": engine_step(arguments, lambda named: Lamb(named, lr=1e-4)),
        "LAMB compiled": engine_step(arguments, lambda named: Lamb(named, lr=1e-4, compiled=True)),
    }
    rounds = [{name: step() for name, step in steps.items()} for _ in range(arguments.rounds + 2)][2:]
    figures: dict[str, Any] = {"ranks": arguments.ranks, "zero": arguments.zero, "preset": arguments.preset}
    for name in steps:
        figures[f"{name} s"] = round(statistics.median(one[name] for one in rounds), 4)
        figures[f"{name} / AdamW"] = round(statistics.median(one[name] / one["AdamW"] for one in rounds), 3)
    if torch.distributed.get_rank() == 0:
        Path(arguments.out).write_text(json.dumps(figures | {"load": round(os.getloadavg()[0], 1)}))
    torch.distributed.destroy_process_group()


def main() -> None:
    """Launch the ranks and print what rank 0 measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="4m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", default="", help="set for the ranks: where rank 0 writes")
    arguments = parser.parse_args()
    if arguments.out:
        work(arguments)
        return
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "figures.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--out", str(out)]
        launch(command, world_size=arguments.ranks, log_dir=Path(temporary), env={"OMP_NUM_THREADS": "1"})
        print(out.read_text())


if __name__ == "__main__":
    main()
