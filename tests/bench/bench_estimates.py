"""What `ingot plan` predicts of a pretraining beside what its ranks hold and do; exits with 1 outside of the bounds.

    OMP_NUM_THREADS=1 python tests/bench/bench_estimates.py [--models demo 40m encoder] [--ranks 1 2] [--zero 0 1 2 3]
    python tests/bench/bench_estimates.py --again tests/bench/estimates_results.jsonl

Memory is the peak resident memory of the rank that holds most, from its start to the written model, with a checkpoint
written meanwhile. Time is the CPU time of a rank for one step (waiting for a core, or for the other rank, does not
count), predicted from the peak that a matrix product reaches in this process just before, in CPU time too: on a machine
that others use, both are taken under the same load. Memory must be within 20 %, time within 30 %.

Beside memory stands the same without the process: libraries, which are most of a small model's. And what DeepSpeed's
own estimators of ZeRO 2 and 3 say of that part: they count 16-bit weights, neither activations nor a snapshot.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from models.architectures.config import count_parameters
from pipelines.core.launcher import launch
from pipelines.data import shards
from pipelines.data.packing import Block
from pipelines.training import estimate, memory, stage
from pipelines.training.config import PretrainConfig
from pipelines.training.metrics import read_records
from pipelines.training.worker_spec import WorkerSpec

MEMORY_BOUND, TIME_BOUND = 0.20, 0.30
SIZE, REPEATS = 512, 15
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "demo": (
        {"preset": "4m", "model": {"ffn_width": 704}, "micro_batch_size": 2, "batch_size": 4, "steps": 10},
        4096,
        256,
    ),
    "40m": ({"preset": "30m", "micro_batch_size": 1, "batch_size": 2, "steps": 6}, 32_000, 128),
    "encoder": (
        {"family": "encoder", "preset": "10m", "micro_batch_size": 2, "batch_size": 4, "steps": 6},
        4096,
        256,
    ),
}
"""Name -> settings, vocabulary, tokens of a sequence. With one rank the batch takes two passes, with two ranks one."""


@dataclass(frozen=True)
class Measured:
    """What the ranks of one training held and did."""

    memory_bytes: int
    """Peak resident memory of the rank that held most."""
    step_s: float
    """CPU seconds of rank 0 for a step."""
    peak_flops: float
    """What this process reached just before."""


def prepare(folder: Path, vocab_size: int, length: int) -> dict[str, Any]:
    """Write random tokens as a prepare artifact and return its index."""
    rng = np.random.Generator(np.random.Philox(0))
    splits = {}
    for split in ("train", "validation"):
        tokens = rng.integers(4, vocab_size, (64, length))
        entries = shards.write(
            [Block.of_rows(tokens)], folder, split, sequence_length=length, dtype="uint16", shard_bytes=1 << 26
        )
        splits[split] = {"shards": entries, "sequences": 64, "tokens": tokens.size, "bytes": tokens.size * 3}
    ids = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    index = {
        "format": 1,
        "sequence_length": length,
        "vocab_size": vocab_size,
        "dtype": "uint16",
        **ids,
        "splits": splits,
    }
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "tokenizer").mkdir()
    return index


def peak_flops() -> float:
    """Return the operations of a matrix product in a second of CPU time, one thread: the median of some."""
    left = torch.ones(SIZE, SIZE)
    rates = []
    for _ in range(REPEATS):
        started = time.process_time()
        left @ left
        rates.append(2.0 * SIZE**3 / max(time.process_time() - started, 1e-9))
    return statistics.median(rates)


class Watch:
    """Reads memory and CPU time of the ranks while they run."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self.memory = 0
        self.cpu_at: dict[int, float] = {}
        """Records written -> CPU seconds of rank 0."""

    def __call__(self) -> None:
        """Take a look; processes that end meanwhile are left out."""
        records = len(read_records(self._spec.metrics))
        for rank, process in self._ranks():
            with contextlib.suppress(psutil.Error, OSError, ValueError):
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
                (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
                self.memory = max(self.memory, int(peak) * 1024)
                if rank == 0 and records and records not in self.cpu_at:
                    self.cpu_at[records] = sum(process.cpu_times()[:2])

    def step_s(self) -> float:
        """Return the CPU seconds of a step, without the first one."""
        first, last = min(self.cpu_at), self._spec.config.steps - 2  # a checkpoint is written from the next one on
        return (self.cpu_at[last] - self.cpu_at[first]) / (last - first)

    def _ranks(self) -> Iterator[tuple[int, psutil.Process]]:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "pipelines.training.worker" in process.cmdline():
                    yield int(process.environ()["RANK"]), process


def measure(spec: WorkerSpec) -> Measured:
    """Train, and return what was seen."""
    torch.set_num_threads(1)
    peak, watch = peak_flops(), Watch(spec)
    stage.write_spec(spec)
    launch(
        [sys.executable, "-m", "pipelines.training.worker", str(spec.scratch / "worker_spec.json")],
        world_size=spec.config.world_size,
        log_dir=spec.logs,
        env=stage.environment(spec),
        on_poll=watch,
    )
    return Measured(watch.memory, watch.step_s(), (peak + peak_flops()) / 2)


def config_of(name: str, ranks: int, zero: int, changes: Mapping[str, Any]) -> PretrainConfig:
    """Return the settings of a case. One checkpoint is written while it trains."""
    settings = MODELS[name][0]
    fixed = {"validate_every": 100, "validation_sequences": 4, "samples": False, "schedule": {"warmup": 1}}
    chosen = {**fixed, **settings, "checkpoint": {"every": settings["steps"] - 1}, **changes}
    return PretrainConfig.model_validate({**chosen, "world_size": ranks, "zero_stage": zero})


def measured(name: str, ranks: int, zero: int, changes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train one case and return what was measured."""
    index = prepare(folder / "data", *MODELS[name][1:])
    config = config_of(name, ranks, zero, changes)
    (folder / "scratch").mkdir()
    seen = measure(
        WorkerSpec(config=config, index=index, data=folder / "data", scratch=folder / "scratch", device="cpu")
    )
    case = {"model": name, "ranks": ranks, "zero": zero, "settings": dict(changes)}
    return {**case, **asdict(seen), "load": round(os.getloadavg()[0], 1), "date": time.strftime("%Y-%m-%d")}


def compared(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return predictions beside what was measured, and ratios."""
    name, ranks, zero = found["model"], found["ranks"], found["zero"]
    config = config_of(name, ranks, zero, found["settings"])
    architecture = estimate.architecture_of(config, *MODELS[name][1:])
    held = memory.of_rank(config, architecture, "cpu")
    pace = estimate.Pace("cpu", found["peak_flops"])
    step_s = estimate.busy_seconds(config, architecture, pace) / config.steps
    beyond = found["memory_bytes"] - held.device["process"]
    theirs = deepspeed_bytes(count_parameters(architecture), memory.largest_layer(architecture), ranks, zero)
    return {
        **found,
        "predicted_bytes": held.most_bytes,
        "memory": held.most_bytes / found["memory_bytes"],
        "beyond_process": (held.most_bytes - held.device["process"]) / beyond,
        "deepspeed": None if theirs is None else theirs / beyond,
        "predicted_step_s": step_s,
        "time": step_s / found["step_s"],
    }


def outside(found: Mapping[str, Any]) -> bool:
    """Tell whether a prediction is outside of the bounds."""
    return abs(found["memory"] - 1) > MEMORY_BOUND or abs(found["time"] - 1) > TIME_BOUND


def main() -> int:
    """Run all cases; return 1 if one is outside of the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--zero", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--set", default="{}", help="more settings of the pretraining, as JSON")
    parser.add_argument("--record", type=Path, help="append what is measured to this file")
    parser.add_argument("--again", type=Path, help="measure nothing: predict the cases of such a file")
    arguments = parser.parse_args()
    heads = ("model", "ranks", "ZeRO", "memory, GB", "measured", "ratio", "beyond the process", "DeepSpeed's")
    print(f"| {' | '.join((*heads, 's a step', 'measured', 'ratio'))} |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    wrong = 0
    for found in map(compared, recorded(arguments.again) if arguments.again else run(arguments)):
        print(line(found), flush=True)
        wrong += outside(found)
    print(f"{wrong} outside of {MEMORY_BOUND:.0%} in memory or {TIME_BOUND:.0%} in time")
    return int(wrong > 0)


def recorded(path: Path) -> list[dict[str, Any]]:
    """Return the measurements of a file."""
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure all cases."""
    for case in itertools.product(arguments.models, arguments.ranks, arguments.zero):
        with tempfile.TemporaryDirectory() as temporary:
            found = measured(*case, json.loads(arguments.set), Path(temporary))
        if arguments.record is not None:
            with arguments.record.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(found) + "\n")
        yield found


def line(found: dict[str, Any]) -> str:
    """Return a row of the table."""
    cells = [
        found["model"],
        str(found["ranks"]),
        str(found["zero"]),
        *(f"{found[key] / 1e9:.2f}" for key in ("predicted_bytes", "memory_bytes")),
        f"{found['memory']:.2f}",
        f"{found['beyond_process']:.2f}",
        "-" if found["deepspeed"] is None else f"{found['deepspeed']:.2f}",
        *(f"{found[key]:.2f}" for key in ("predicted_step_s", "step_s")),
        f"{found['time']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def deepspeed_bytes(parameters: int, largest: int, ranks: int, zero: int) -> int | None:
    """Return what DeepSpeed's own estimator says of the states of a rank; None for the stages that it has none for."""
    if zero < 2:
        return None
    if zero == 2:
        return int(estimate_zero2_model_states_mem_needs(parameters, ranks, cpu_offload=False)[1])
    return int(estimate_zero3_model_states_mem_needs(parameters, largest, ranks, 1, cpu_offload=False)[1])


if __name__ == "__main__":
    sys.exit(main())
