"""What training buys at few bits, on the bench model: BitNet, ParetoQ and Maestro beside their plain arms.

    OMP_NUM_THREADS=1 python tests/bench/quantized_training.py [--minutes 25] [--results FILE] [--table]

* BitNet b1.58 from random weights beside full precision at equal steps: the mean and the median as scale, and both at
  twice the width. Two rates each at seed 0; the better one counts, and further seeds take it.
* ParetoQ at 1, 1.58, 2, 3 and 4 bits beside the same grid untrained, round to nearest and GPTQ; and how far its weights
  went from the parent's, as a share of their norm (the paper: far at 2 bits and below, hardly at 3 and more), beside
  how far the same steps in full precision go.
* Maestro at a quarter of the weights beside a truncated SVD with the same steps, and beside a narrower dense model that
  has as few weights in its layers and sees as many tokens in all as the parent and Maestro together.

Every arm is a child made by the compress stage, trained by its engine, and judged by its perplexity over the parent's
on the bench's held-out text. Finished arms are lines of the results file and are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_compression import bench_model
from safetensors.torch import load_file

from pipelines.compression import qat
from pipelines.compression.config import CompressConfig
from pipelines.compression.run import CompressionRun
from pipelines.compression.stage import run
from pipelines.core.compute import ComputeConfig
from pipelines.core.stage import StageContext
from pipelines.modelio.load import load_model
from pipelines.training import worker

RESULTS = Path(__file__).with_name("quantized_training_results.jsonl")
SCHEDULE: dict[str, Any] = {"engine": "plain", "world_size": 1, "zero_stage": 0, "batch_size": 12}
SCHEDULE |= {"micro_batch_size": 12, "baselines": False, "validation_sequences": 16}
SCHEDULE |= {"validate_every": 100_000, "checkpoint_every": 100_000}
SCRATCH_STEPS, TUNING_STEPS, LOW_RANK_STEPS, PARENT_STEPS = 250, 100, 60, 1100
SEEDS = (0, 1, 2)

Cell = dict[str, Any]


# ---- the arms -------------------------------------------------------------------------------------------------------


def cells() -> Iterator[Cell]:
    """Yield what is to be run: `group`, `arm`, `seed` and the table of the compress stage; seed 0 first."""
    for seed in SEEDS:
        yield from paretoq(seed)
        yield from low_rank(seed)
        yield from bitnet(seed)


def cell(group: str, arm: str, seed: int, **table: Any) -> Cell:
    """Return one arm."""
    trained = SCHEDULE if "steps" in table else {}
    return {
        "group": group,
        "arm": arm,
        "seed": seed,
        "table": {"seed": seed, "baseline_documents": 0, **trained, **table},
    }


def bitnet(seed: int) -> Iterator[Cell]:
    """Yield models from random weights."""
    arms: dict[str, dict[str, Any]] = {
        "fp32": {"method": "finetune"},
        "mean": {"method": "bitnet"},
        "median": {"method": "bitnet", "scale": "median"},
        "mean, twice the width": {"method": "bitnet", "widen": 2},
        "fp32, twice the width": {"method": "finetune", "widen": 2},
    }
    for arm, table in arms.items():
        for lr in (1e-3,) if seed else (1e-3, 3e-3):
            yield cell("bitnet", arm, seed, init_from="scratch", steps=SCRATCH_STEPS, lr=lr, **table)


def paretoq(seed: int) -> Iterator[Cell]:
    """Yield the parent at few bits, rounded and trained."""
    yield cell("paretoq", "fp32", seed, method="finetune", steps=TUNING_STEPS, lr=1e-3)
    for bits in (1, 1.58, 2, 3, 4):
        yield cell("paretoq", f"{bits:g} bits", seed, method="paretoq", bits=bits, steps=TUNING_STEPS, lr=1e-3)
        if seed == 0:
            yield cell("paretoq", f"{bits:g} bits untrained", seed, method="paretoq", bits=bits, steps=0)
        if bits >= 2 and seed == 0:
            for method in ("rtn", "gptq"):
                yield cell("paretoq", f"{bits:g} bits {method}", seed, method=method, bits=bits, group_size=0)


def low_rank(seed: int) -> Iterator[Cell]:
    """Yield models of a quarter of the weights in the layers."""
    factored = {"method": "maestro", "share": 0.25, "value_bits": 32, "lr": 1e-3, "steps": LOW_RANK_STEPS}
    yield cell("maestro", "maestro", seed, **factored)
    yield cell("maestro", "svd, then trained", seed, **factored, cut="start")
    narrow = {"width": 64, "ffn_width": 192, "init_from": "scratch", "soft": 0.0, "lr": 3e-3}
    yield cell("maestro", "narrower dense", seed, method="distill", steps=PARENT_STEPS + LOW_RANK_STEPS, **narrow)


# ---- one arm --------------------------------------------------------------------------------------------------------


def make(bench: Any, base: float, table: dict[str, Any], place: Path) -> dict[str, Any]:
    """Make a child and return its perplexity ratio, the bytes of its weights, and how far training took its layers."""
    (place / "out").mkdir(parents=True)
    context = StageContext("compress.x", place / "scratch", compute=ComputeConfig(device="cpu"))
    config = CompressConfig.model_validate(table)
    inputs = {"prepare": bench.prepare, "model": bench.parent}
    found: dict[str, Any] = {}
    if table.get("steps"):
        spec = qat.make_worker_spec(CompressionRun.open(config, inputs, place / "out", context, run))
        qat.training.write_spec(spec)
        if worker.main([str(spec.scratch / "worker_spec.json")]):
            raise SystemExit(f"training failed: {table}")
        found["drift"] = drift(weights_in(bench.parent.path / "model"), weights_in(spec.model))
    run(config, inputs, place / "out", context)
    child = place / "out" / "model"
    found["bytes"] = sum(path.stat().st_size for path in child.glob("*.safetensors"))
    return found | {"ratio": math.exp(bench.loss(load_model(child)) - base)}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a model folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def drift(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float | None:
    """Return the norm of the change of all projections over their norm; None where shapes or names differ."""
    names = [name for name in before if ".layers." in name and before[name].ndim == 2]
    if any(name not in after or after[name].shape != before[name].shape for name in names):
        return None
    moved = sum(float((after[name].double() - before[name].double()).square().sum()) for name in names)
    return math.sqrt(moved / sum(float(before[name].double().square().sum()) for name in names))


def key_of(cell: Cell) -> dict[str, Any]:
    """Return what a result is found by."""
    return {name: cell[name] for name in ("group", "arm", "seed")} | {"lr": cell["table"].get("lr")}


def work(minutes: float, path: Path) -> None:
    """Run what is missing until the time is used up."""
    torch.set_num_threads(1)
    bench = bench_model()
    base, until = bench.loss(load_model(bench.parent.path / "model")), time.monotonic() + 60 * minutes
    for each in cells():
        if any(key_of(each).items() <= row.items() for row in read(path)):
            continue
        if time.monotonic() > until:
            print("time is up; call again to go on")
            return
        with tempfile.TemporaryDirectory() as temporary:
            started = time.monotonic()
            row = key_of(each) | make(bench, base, each["table"], Path(temporary) / "child")
            row["seconds"] = round(time.monotonic() - started, 1)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    print("every run is done")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the finished arms."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def markdown(found: list[dict[str, Any]]) -> str:
    """Return a row for each arm: the better rate's ratio over seeds, bytes, and drift."""
    lines = ["| group | arm | perplexity over the parent's | rate | KB | drift |", "|---|---|---|---|---|---|"]
    for group, arm in dict.fromkeys((row["group"], row["arm"]) for row in found):
        rows = [row for row in found if (row["group"], row["arm"]) == (group, arm)]
        rate = min((row for row in rows if row["seed"] == 0), key=lambda row: row["ratio"])["lr"]
        chosen = [row for row in rows if row["lr"] == rate]
        ratios = ", ".join(f"{row['ratio']:.3f}" for row in chosen)
        moved = chosen[0].get("drift")
        shown = "" if moved is None or group == "bitnet" else f"{moved:.3f}"
        lines.append(f"| {group} | {arm} | {ratios} | {rate or ''} | {chosen[0]['bytes'] / 1024:.0f} | {shown} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Run the missing arms, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    wanted = parser.parse_args(arguments)
    if not wanted.table:
        work(wanted.minutes, wanted.results)
    print(markdown(read(wanted.results)))


if __name__ == "__main__":
    main(sys.argv[1:])
