"""Does LAMB keep its quality as the batch grows? Equal samples, four optimizers, three rates each, two tasks.

    python tests/bench/large_batch.py [--minutes 25] [--preset cpu|h200] [--results FILE] [--table] [--plot FILE]

Every run trains on the same number of sequences, so a batch four times larger gets a quarter of the steps; rates grow
with the square root of the batch, and the share of the warm-up in proportion to it (LAMB's paper, section 4). Finished
runs are lines of the results file, and are not repeated: stop at any time and call it again. Seed 0 comes first, all
rates of it; the other seeds run at each cell's best rate.

The h200 preset is the full table, 30 M parameters and batches of 128 to 8,192 sequences: it wants a corpus of some
300 million tokens in place of the bundled one, which it would see eighty times.

The rates are those at the smallest batch. Two numbers are of interest for each optimizer: the best of its three rates
at each batch, and what the rule makes, at the largest batch, of the rate that was best at the smallest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from models.architectures.build import build
from models.optim import schedule
from pipelines.core.artifact import Artifact
from pipelines.core.program import ROOT as CHECKOUT
from pipelines.core.run_stage import materialize
from pipelines.core.stage import StageContext
from pipelines.core.store import LocalStore
from pipelines.data.config import PrepareConfig, PrepareJob
from pipelines.data.shards import ShardReader
from pipelines.stages import STAGES
from pipelines.training import phases
from pipelines.training.callbacks import validate
from pipelines.training.config import PretrainConfig
from pipelines.training.data_loader import DataLoader
from pipelines.training.distributed import Ranks
from pipelines.training.engine import PlainEngine
from pipelines.training.loss_module import LossModule, make_objective
from pipelines.training.optimizers import learning_rate, make_optimizer

RESULTS = Path(__file__).with_name("large_batch_results.jsonl")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "lamb": {"name": "lamb", "betas": (0.9, 0.999), "eps": 1e-6, "clip": None},
    "adamw": {"name": "adamw", "betas": (0.9, 0.999), "eps": 1e-8, "clip": None},
    "adamw+clip": {"name": "adamw", "betas": (0.9, 0.999), "eps": 1e-8, "clip": 1.0},
    "lars": {"name": "lars", "clip": None},
}
TASKS = {"causal": "decoder", "masked": "encoder"}
WARMUP_AT_LARGEST = 0.2
"""Share of the steps; the paper's at 32 K. In proportion to the batch below that."""


@dataclass(frozen=True)
class Preset:
    """The size of the experiment."""

    model: str
    vocabulary: int
    length: int
    """Tokens of a sequence."""
    batches: tuple[int, ...]
    steps: int
    """Steps at the largest batch."""
    micro_batch: int
    held_out: int
    """Validation sequences."""
    seeds: int
    precision: str
    rates: dict[str, tuple[float, float, float]]
    """At the smallest batch: low, middle, high."""


PRESETS = {
    "cpu": Preset(
        model="0.5m",
        vocabulary=1024,
        length=32,
        batches=(4, 16, 64),
        steps=300,
        micro_batch=64,
        held_out=512,
        seeds=2,
        precision="fp32",
        rates={
            "lamb": (0.005, 0.01, 0.02),
            "adamw": (0.001, 0.002, 0.004),
            "adamw+clip": (0.001, 0.002, 0.004),
            "lars": (0.005, 0.01, 0.02),
        },
    ),
    "h200": Preset(
        model="30m",
        vocabulary=4096,
        length=128,
        batches=(128, 512, 2048, 8192),
        steps=300,
        micro_batch=512,
        held_out=1024,
        seeds=3,
        precision="bf16",
        rates={
            "lamb": (0.005, 0.01, 0.02),
            "adamw": (0.0005, 0.001, 0.002),
            "adamw+clip": (0.0005, 0.001, 0.002),
            "lars": (0.005, 0.01, 0.02),
        },
    ),
}


@dataclass(frozen=True)
class Cell:
    """One run of the grid; what its result is found by."""

    preset: str
    task: str
    optimizer: str
    batch: int
    base_rate: float
    """At the smallest batch."""
    seed: int

    @property
    def rate(self) -> float:
        """Peak rate at this batch: grows with its square root."""
        return schedule.square_root_scaled(self.base_rate, self.batch, PRESETS[self.preset].batches[0])

    @property
    def steps(self) -> int:
        """Steps that show as many sequences as every other cell sees."""
        preset = PRESETS[self.preset]
        return preset.steps * preset.batches[-1] // self.batch

    @property
    def warmup(self) -> int:
        """Steps of warm-up: their share grows in proportion to the batch."""
        return max(1, round(WARMUP_AT_LARGEST * self.steps * self.batch / PRESETS[self.preset].batches[-1]))

    def config(self) -> PretrainConfig:
        """Return the settings of the run."""
        preset = PRESETS[self.preset]
        return PretrainConfig.model_validate(
            {
                "family": TASKS[self.task],
                "preset": preset.model,
                "optimizer": {**OPTIMIZERS[self.optimizer], "lr": self.rate},
                "schedule": {"warmup": self.warmup, "decay": "polynomial", "power": 1.0},
                "engine": "plain",
                "world_size": 1,
                "zero_stage": 0,
                "steps": self.steps,
                "batch_size": self.batch,
                "micro_batch_size": min(self.batch, preset.micro_batch),
                "precision": preset.precision,
                "seed": self.seed,
                "validation_sequences": preset.held_out,
            }
        )


Result = dict[str, Any]


# ---- the grid -------------------------------------------------------------------------------------------------------


def first_seed(name: str, task: str) -> Iterator[Cell]:
    """Yield the cells of seed 0: middle rates and large batches first, so that an unfinished table can be read."""
    preset = PRESETS[name]
    for place, batch, optimizer in itertools.product((1, 0, 2), reversed(preset.batches), OPTIMIZERS):
        yield Cell(name, task, optimizer, batch, preset.rates[optimizer][place], 0)


def other_seeds(name: str, task: str, results: list[Result]) -> Iterator[Cell]:
    """Yield the other seeds of every optimizer and batch at the rate that was best with seed 0."""
    preset = PRESETS[name]
    for seed, optimizer, batch in itertools.product(range(1, preset.seeds), OPTIMIZERS, reversed(preset.batches)):
        tried = chosen(results, name, task, optimizer, batch, seed=0)
        if tried:
            yield Cell(name, task, optimizer, batch, min(tried, key=held_out_loss)["base_rate"], seed)


def chosen(results: list[Result], name: str, task: str, optimizer: str, batch: int, **more: Any) -> list[Result]:
    """Return the finished runs of one place of the table."""
    wanted = {"preset": name, "task": task, "optimizer": optimizer, "batch": batch, **more}
    return [result for result in results if wanted.items() <= result.items()]


def held_out_loss(result: Result) -> float:
    """Return the loss by which rates are compared; a run that diverged has none and counts as worst."""
    return float("inf") if result["loss"] is None else float(result["loss"])


def missing(name: str, tasks: list[str], results: list[Result]) -> Iterator[Cell]:
    """Yield what is still to run, in order; `results` may grow meanwhile."""
    for plan in (lambda task: first_seed(name, task), lambda task: other_seeds(name, task, results)):
        for task in tasks:
            for cell in plan(task):
                if not chosen(
                    results, name, task, cell.optimizer, cell.batch, base_rate=cell.base_rate, seed=cell.seed
                ):
                    yield cell


# ---- one run --------------------------------------------------------------------------------------------------------


def prepared(preset: Preset, root: Path) -> Artifact:
    """Return the packed corpus, made by the prepare stage unless the store has it."""
    from pipelines.data import versioning

    job = PrepareJob(prepare=PrepareConfig(vocab_size=preset.vocabulary, sequence_length=preset.length))
    versioning.ensure(job.data, CHECKOUT)
    data_hash = versioning.data_hash(job.data, CHECKOUT)
    context = StageContext("prepare", root)
    keys = {"data": data_hash}
    return materialize(STAGES["prepare"], job, {}, LocalStore(root), context, input_keys=keys, data_hash=data_hash)


def train(cell: Cell, data: Artifact, device: torch.device) -> Result:
    """Train one cell and return its line."""
    config = cell.config()
    index = data.read_json("index.json")
    architecture = config.architecture(index)
    objective = LossModule(build(architecture, seed=config.seed))
    engine = PlainEngine(
        objective, lambda named: make_optimizer(config, named), device=device, precision=config.precision
    )
    loader = DataLoader(
        train=ShardReader(data.path, "train"),
        validation=ShardReader(data.path, "validation"),
        objective=make_objective(config, architecture),
        ranks=Ranks(0, 1, device),
        seed=config.seed,
        phases=phases.phases_of(config),
        micro_batch_size=config.micro_batch_size,
        validation_sequences=config.validation_sequences,
    )
    started = time.monotonic()
    skipped = sum(one_step(engine, loader, config, step) for step in range(config.steps))
    loss = validate(engine, loader)
    facts = {"rate": cell.rate, "steps": cell.steps, "warmup": cell.warmup, "skipped": skipped}
    finite = loss == loss and loss != float("inf")
    return {**asdict(cell), **facts, "loss": loss if finite else None, "seconds": round(time.monotonic() - started, 1)}


def one_step(engine: PlainEngine, loader: DataLoader, config: PretrainConfig, step: int) -> bool:
    """Do one step; return whether it was skipped because something was not finite."""
    batches = [batch.to(engine.ranks.device) for batch in loader.batches(step)]
    targets = sum(batch.targets for batch in batches)
    for number, batch in enumerate(batches, start=1):
        engine.backward(engine.loss(batch) / targets, last=number == len(batches))
    return engine.step(learning_rate(config, step)).skipped


def read(path: Path) -> list[Result]:
    """Return the finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def work(name: str, tasks: list[str], path: Path, root: Path, minutes: float) -> None:
    """Run what is missing, one line each, until the time is used up; a run that would not fit is not begun."""
    device = torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")
    data, until = prepared(PRESETS[name], root), time.monotonic() + 60 * minutes
    results, longest = read(path), 0.0
    for cell in missing(name, tasks, results):
        if time.monotonic() + longest > until:
            print("time is up; call again to go on", flush=True)
            return
        result = train(cell, data, device)
        longest = max(longest, result["seconds"])
        results.append(result)
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)
    print("every run is done", flush=True)


# ---- what came out --------------------------------------------------------------------------------------------------


def rows(results: list[Result], name: str, task: str) -> list[list[str]]:
    """Return one row per optimizer: best loss at each batch, growth, and what the rule makes of the small rate."""
    preset = PRESETS[name]
    table = []
    for optimizer in OPTIMIZERS:
        best = [_best(chosen(results, name, task, optimizer, batch)) for batch in preset.batches]
        ruled = _ruled(results, name, task, optimizer)
        growth = f"{best[-1][0] / best[0][0] - 1:+.1%}" if best[0] and best[-1] else ""
        table.append([optimizer, *(_shown(each) for each in best), growth, ruled])
    return table


def _best(results: list[Result]) -> tuple[float, float, int, float] | None:
    """Return mean and half the range over seeds, number of seeds, and rate, of the rate that is best with seed 0."""
    tried = [result for result in results if result["seed"] == 0]
    if not tried:
        return None
    rate = min(tried, key=held_out_loss)["base_rate"]
    losses = [held_out_loss(result) for result in results if result["base_rate"] == rate]
    return statistics.fmean(losses), (max(losses) - min(losses)) / 2, len(losses), rate


def _shown(best: tuple[float, float, int, float] | None) -> str:
    if best is None:
        return ""
    mean, half, seeds, rate = best
    return f"{mean:.3f}" + (f" ± {half:.3f}" if seeds > 1 else "") + f" ({rate:g})"


def _ruled(results: list[Result], name: str, task: str, optimizer: str) -> str:
    """Return the loss at the largest batch at the scaled rate that was best at the smallest."""
    batches = PRESETS[name].batches
    best = _best(chosen(results, name, task, optimizer, batches[0]))
    if best is None:
        return ""
    found = chosen(results, name, task, optimizer, batches[-1], base_rate=best[3], seed=0)
    return f"{held_out_loss(found[0]):.3f}" if found else ""


def markdown(results: list[Result], name: str) -> str:
    """Return the tables of both tasks."""
    preset, lines = PRESETS[name], []
    for task in TASKS:
        heads = ["optimizer", *(f"batch {b}, {preset.steps * preset.batches[-1] // b} steps" for b in preset.batches)]
        heads += ["growth", "largest batch at the rule's rate"]
        lines += [f"{task}, nats a target on held-out text (best base rate):", ""]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        lines += ["| " + " | ".join(row) + " |" for row in rows(results, name, task)] + [""]
    return "\n".join(lines)


def plot(results: list[Result], name: str, path: Path) -> None:
    """Draw the best loss over the batch, one panel a task, with every rate that was tried as a faint point."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(9.0, 3.8), layout="constrained")
    for axis, task in zip(axes, TASKS, strict=True):
        for number, optimizer in enumerate(OPTIMIZERS):
            _line(axis, results, (name, task, optimizer), f"C{number}")
        axis.set(title=f"{task} language model", xlabel="sequences a step", xscale="log")
        axis.set_xticks(PRESETS[name].batches, [str(b) for b in PRESETS[name].batches])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out loss, nats a target")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def _line(axis: Any, results: list[Result], place: tuple[str, str, str], colour: str) -> None:
    name, task, optimizer = place
    marks = {"lamb": "o", "adamw": "s", "adamw+clip": "^", "lars": "D"}
    points = []
    for batch in PRESETS[name].batches:
        tried = chosen(results, name, task, optimizer, batch)
        axis.plot([batch] * len(tried), [held_out_loss(r) for r in tried], marks[optimizer], color=colour, alpha=0.2)
        if (best := _best(tried)) is not None:
            points.append((batch, best[0]))
    axis.plot([b for b, _ in points], [y for _, y in points], marks[optimizer] + "-", color=colour, label=optimizer)


def main(arguments: list[str]) -> None:
    """Run the missing cells, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--task", choices=TASKS, action="append", help="only this task; may be repeated")
    parser.add_argument("--minutes", type=float, default=25.0, help="stop before this time is used up")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--store", type=Path, default=CHECKOUT / ".ingot")
    parser.add_argument("--table", action="store_true", help="print the tables and run nothing")
    parser.add_argument("--plot", type=Path, help="draw the picture and run nothing")
    chosen_ = parser.parse_args(arguments)
    if not chosen_.table and chosen_.plot is None:
        work(chosen_.preset, chosen_.task or list(TASKS), chosen_.results, chosen_.store, chosen_.minutes)
    if chosen_.plot is not None:
        plot(read(chosen_.results), chosen_.preset, chosen_.plot)
    print(markdown(read(chosen_.results), chosen_.preset))


if __name__ == "__main__":
    main(sys.argv[1:])
