"""Trainer against a bare PyTorch loop and HF Trainer on the same model, turn by turn in one process: fair ratios.

    OMP_NUM_THREADS=1 python tests/bench/bench_trainer.py [--preset 4m] [--rounds 12] [--ranks 2 --zero 2]

Prints tokens per second of the bare loop (torch AdamW, fused, clipping), of transformers' Trainer (the same; it logs
every step, and neither evaluates nor saves), of this trainer with AdamW and with LAMB, eager and compiled (plain
engine; metrics every step), and medians over rounds of the ratio to the bare loop and to HF Trainer in the same round.
On one thread the time is the CPU time of the process, so that waiting for a core does not count. With --ranks it then
launches that many ranks under DeepSpeed with LAMB and prints their throughput and where a step's time goes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from models.architectures.build import build
from pipelines.core.launcher import launch
from pipelines.data import shards
from pipelines.data.packing import Block
from pipelines.training import trainer as training
from pipelines.training import worker
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.config import PretrainConfig
from pipelines.training.engine import create
from pipelines.training.loss_module import LossModule
from pipelines.training.metrics import peak, read_records
from pipelines.training.optimizers import make_optimizer
from pipelines.training.worker_spec import WorkerSpec

VOCABULARY, LENGTH, BATCH = 4096, 256, 8
TOKENS = LENGTH * BATCH


def prepare(folder: Path) -> dict[str, Any]:
    """Write random tokens as a prepare artifact and return its index."""
    rng = np.random.Generator(np.random.Philox(0))
    splits = {}
    for split in ("train", "validation"):
        tokens = rng.integers(4, VOCABULARY, (256, LENGTH))
        entries = shards.write(
            [Block.of_rows(tokens)], folder, split, sequence_length=LENGTH, dtype="uint16", shard_bytes=1 << 26
        )
        splits[split] = {"shards": entries, "sequences": 256, "tokens": tokens.size, "bytes": tokens.size * 3}
    ids = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    index = {"format": 1, "sequence_length": LENGTH, "vocab_size": VOCABULARY, "dtype": "uint16", **ids}
    (folder / "index.json").write_text(json.dumps({**index, "splits": splits}))
    (folder / "tokenizer").mkdir()
    return {**index, "splits": splits}


def spec(folder: Path, index: dict[str, Any], name: str, **changes: Any) -> WorkerSpec:
    """Return the order of one run."""
    values = {
        "steps": 10_000,
        "validate_every": 10_000,
        "checkpoint": {"every": 10_000},
        "batch_size": BATCH,
        "threads": torch.get_num_threads(),
        **changes,
    }
    work = folder / name
    work.mkdir()
    config = PretrainConfig.model_validate(values)
    return WorkerSpec(config=config, index=index, data=folder, scratch=work, device="cpu")


def bare(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    """Return one step of the loop that a tutorial would show."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def trainer(order: WorkerSpec) -> Callable[[], None]:
    """Return one step of the trainer, with data, metrics and all."""
    architecture = order.config.architecture(order.index)
    objective = LossModule(build(architecture, seed=0))
    device = worker.device_of(order)
    engine = create(order.config, objective, lambda named: make_optimizer(order.config, named), device)
    state = training.State()
    checkpoints = Checkpoints(order.checkpoints, 2)
    logging = worker.open_logs(order, architecture, state, engine.ranks, peak(device, "fp32").flops)
    made = training.Trainer(
        config=order.config,
        engine=engine,
        loader=worker.make_loader(order, architecture, engine.ranks),
        checkpointer=checkpoints,
        state=state,
        callbacks=worker.callbacks(order, logging),
        stop_requested=worker.StopRequest(),
    )
    made.start()
    return made.advance


class Turns(TrainerCallback):
    """Times HF Trainer's steps, and after each of them one step of every other arm."""

    def __init__(self, others: dict[str, Callable[[], object]]) -> None:
        self.others = others
        self.seconds: dict[str, list[float]] = {name: [] for name in ("HF Trainer", *others)}
        self.clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.started = self.clock()

    def on_step_end(self, *_arguments: Any, **_named: Any) -> None:
        """Take the time since the last turn as HF Trainer's, then give every other arm its turn."""
        self.seconds["HF Trainer"].append(self.clock() - self.started)
        for name, step in self.others.items():
            started = self.clock()
            step()
            self.seconds[name].append(self.clock() - started)
        self.started = self.clock()


def hugging_face(model: nn.Module, tokens: torch.Tensor, folder: Path, steps: int, turns: Turns) -> None:
    """Run transformers' Trainer with its defaults, but for the settings that the bare loop has too."""
    arguments = TrainingArguments(
        output_dir=str(folder / "hf"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-4,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens] * steps
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[turns]).train()


def compare(folder: Path, index: dict[str, Any], preset: str, rounds: int) -> None:
    """Run all arms turn by turn and print medians."""
    plain = {"preset": preset, "engine": "plain", "world_size": 1, "zero_stage": 0, "micro_batch_size": BATCH}
    optimizers = {"adamw": {}, "lamb": {}, "lamb compiled": {"compiled": True}}
    orders = {
        name: spec(folder, index, name, optimizer={"name": name.split()[0], "lr": 1e-4, **options}, **plain)
        for name, options in optimizers.items()
    }
    tokens = torch.from_numpy(shards.ShardReader(folder, "train").take(np.arange(BATCH)))
    architecture = orders["adamw"].config.architecture(index)
    others = {"bare loop": bare(build(architecture, seed=0), tokens)}
    turns = Turns(others | {f"trainer, {name}": trainer(order) for name, order in orders.items()})
    with contextlib.redirect_stdout(io.StringIO()):
        hugging_face(build(architecture, seed=0), tokens, folder, rounds + 2, turns)
    seconds = {name: values[2:] for name, values in turns.seconds.items()}
    print(f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads")
    for name, values in seconds.items():
        value = statistics.median(values)
        bare_ratio, hf_ratio = (
            statistics.median(b / t for b, t in zip(seconds[base], values, strict=True))
            for base in ("bare loop", "HF Trainer")
        )
        print(
            f"{name:22s} {TOKENS / value:8,.0f} tokens/s   {value:.3f} s/step   {bare_ratio:.3f} of the bare loop   "
            f"{hf_ratio:.3f} of HF Trainer"
        )


def sharded(folder: Path, index: dict[str, Any], preset: str, ranks: int, zero: int, steps: int) -> None:
    """Launch real ranks and print the median step."""
    split = {"world_size": ranks, "zero_stage": zero, "micro_batch_size": BATCH // ranks}
    order = spec(folder, index, "ranks", preset=preset, steps=steps, schedule={"warmup": 1}, **split)
    (order.scratch / "worker_spec.json").write_text(order.model_dump_json())
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "pipelines.training.worker", str(order.scratch / "worker_spec.json")]
    launch(command, world_size=ranks, log_dir=order.logs, env=environment)
    records = read_records(order.metrics)[2:]
    rate = statistics.median(record["tokens_per_s"] for record in records)
    parts = {p: statistics.median(r[f"time/{p}"] for r in records) for p in ("data", "forward", "backward", "step")}
    split_text = ", ".join(f"{part} {value:.3f}" for part, value in parts.items())
    print(f"{ranks} ranks, ZeRO-{zero}, lamb: {rate:,.0f} tokens/s, {TOKENS / rate:.3f} s/step ({split_text})")


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="4m")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--ranks", type=int, default=0)
    parser.add_argument("--zero", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        index = prepare(folder)
        compare(folder, index, arguments.preset, arguments.rounds)
        if arguments.ranks:
            sharded(folder, index, arguments.preset, arguments.ranks, arguments.zero, arguments.rounds + 2)


if __name__ == "__main__":
    main()
