"""LISA beside full AdamW and LoRA at equal steps: quality, memory, time. From a pretrained model and from scratch.

    python tests/bench/lisa_quality.py [--steps 150] [--minutes 25] [--results FILE] [--table]

A model is pretrained on the books of the bundled corpus and then tuned on its manuals, another kind of text, by full
AdamW, by LISA with 0 (embeddings, final norm and head only: the control), 2 and 4 layers at a time, and by LoRA whose
rank is chosen so that it takes as much memory as LISA with 2. Each arm has three or four rates and shows the best one.
The last arm draws layers by what the full run measured (`lisa.weights = "measured"`).

Memory is counted tensor by tensor, at the step that needs most: weights, gradients and optimizer state, and what
autograd keeps of the forward pass. The sum is an upper bound: gradients grow while what was kept is given back.
Time is processor time of this process, so that a busy machine does not count. Finished arms are lines of the results
file, and are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from large_batch import PRESETS, prepared
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.architectures.build import build
from models.objectives.causal import next_tokens
from models.optim import lisa, schedule
from models.optim.adamw import AdamW
from pipelines.core.artifact import Artifact
from pipelines.core.program import ROOT as CHECKOUT
from pipelines.data import packing, tokenizer
from pipelines.training import data_order
from pipelines.training.config import PretrainConfig
from pipelines.training.data_loader import Batch
from pipelines.training.loss_module import LossModule

RESULTS = Path(__file__).with_name("lisa_quality_results.jsonl")
TUNED_ON = "python-docs"
LAYERS, LENGTH, BATCH, INTERVAL = 8, 32, 8, 10
BASE_STEPS, BASE_RATE = 1200, 4e-3
RATES = {"full": (1e-3, 3e-3, 1e-2, 3e-2), "lisa": (1e-3, 3e-3, 1e-2, 3e-2), "lora": (3e-3, 1e-2, 3e-2)}
RANKS = (1, 2, 4, 8, 16, 32)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Text:
    """Packed tokens of one kind of text."""

    train: np.ndarray[Any, np.dtype[np.int64]]
    held_out: np.ndarray[Any, np.dtype[np.int64]]
    bytes_per_token: float
    """Of the held-out text."""


# ---- data -----------------------------------------------------------------------------------------------------------


def documents(data: Artifact, split: str, *, manuals: bool) -> list[str]:
    """Return the texts of the manuals, or of everything else, in a split."""
    path = data.path / "documents" / f"{split}.jsonl.zst"
    with zstandard.open(path, "rb") as stream:
        rows = [json.loads(line) for line in io.TextIOWrapper(stream, encoding="utf-8")]
    return [row["text"] for row in rows if (row["source"] == TUNED_ON) == manuals]


def packed(data: Artifact, *, manuals: bool) -> Text:
    """Tokenize and pack one kind of text."""
    from tokenizers import Tokenizer

    index = data.read_json("index.json")
    words = Tokenizer.from_file(str(data.path / "tokenizer" / "tokenizer.json"))
    parts, size = {}, 0
    for split in ("train", "validation"):
        texts = documents(data, split, manuals=manuals)
        tokens = tokenizer.encode(words, texts)
        blocks = packing.concatenated(tokens, LENGTH, bos_id=index["bos_id"], eos_id=index["eos_id"])
        parts[split] = np.concatenate([block.tokens_ST for block in blocks])
        size = sum(len(text.encode()) for text in texts)
    return Text(parts["train"], parts["validation"][:512], size / sum(len(t) for t in tokens))


# ---- one arm --------------------------------------------------------------------------------------------------------


def fresh(data: Artifact) -> nn.Module:
    """Return the model with random weights."""
    config = PretrainConfig.model_validate({"preset": "0.5m", "model": {"layers": LAYERS}})
    return build(config.architecture(data.read_json("index.json")), seed=0)


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """Return a copy whose projections have trainable low-rank additions and whose own weights are frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS, lora_dropout=0.0, bias="none")
    torch.manual_seed(0)
    return inject_adapter_in_model(config, copy.deepcopy(model))


@dataclass
class Arm:
    """A way to train: the model, its optimizer, and which layers train when."""

    model: nn.Module
    active: int | None = None
    """Layers that LISA trains at a time; None trains all that can be."""
    weights: list[float] | None = None

    def __post_init__(self) -> None:
        self.objective = LossModule(self.model)
        trainable = [(name, p) for name, p in self.objective.named_parameters() if p.requires_grad]
        self.optimizer = AdamW(
            lisa.layer_groups(trainable) if self.active is not None else trainable, weight_decay=0.01
        )

    def draw(self, step: int) -> None:
        """Choose the layers of LISA's next interval."""
        if self.active is None or step % INTERVAL:
            return
        layers = lisa.draw(0, step // INTERVAL, LAYERS, self.active, self.weights)
        names = lisa.active_names([name for name, _ in self.objective.named_parameters()], layers)
        lisa.set_requires_grad(self.objective, names)
        self.optimizer.set_active(names)

    def step(self, tokens: np.ndarray[Any, Any], rate: float) -> dict[str, int]:
        """Take one step; return the bytes held at its peak, by kind."""
        batch = Batch.of(tokens, next_tokens(tokens, bos_id=-1, pad_id=-1), -1)
        kept: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def note(tensor: Tensor) -> Tensor:
            place = tensor.untyped_storage()
            if place.data_ptr() not in own:
                kept[place.data_ptr()] = place.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.objective(batch.inputs_BT, batch.targets_BT) / batch.targets
        loss.backward()
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "weights": sum(p.nbytes for p in self.model.parameters()),
            "gradients": gradients,
            "optimizer": self.optimizer.state_bytes(),
            "activations": sum(kept.values()),
        }


def train(arm: Arm, text: Text, steps: int, rate: float) -> dict[str, Any]:
    """Train an arm; return its held-out bits per byte, peak bytes by kind, and median seconds of a step."""
    peaks: list[dict[str, int]] = []
    seconds = []
    for step in range(steps):
        rows = data_order.ids(0, step * BATCH, BATCH, len(text.train))[0]
        share = schedule.multiplier(step, total=steps, warmup=steps // 20, decay="cosine")
        arm.draw(step)
        started = time.process_time()
        peaks.append(arm.step(text.train[rows], rate * share))
        seconds.append(time.process_time() - started)
    peak = max(peaks, key=lambda held: sum(held.values()))
    return {"bits_per_byte": bits_per_byte(arm, text), "bytes": peak, "step_s": round(statistics.median(seconds), 4)}


def bits_per_byte(arm: Arm, text: Text) -> float:
    """Return the held-out loss in bits per byte of text."""
    nats, targets = 0.0, 0
    with torch.no_grad():
        for rows in np.array_split(text.held_out, 16):
            batch = Batch.of(rows, next_tokens(rows, bos_id=-1, pad_id=-1), -1)
            nats += float(arm.objective(batch.inputs_BT, batch.targets_BT))
            targets += batch.targets
    return nats / targets / math.log(2) / text.bytes_per_token


def equal_rank(base: nn.Module, text: Text, wanted: int) -> int:
    """Return the LoRA rank whose step holds as many bytes as `wanted`, as nearly as a power of two can."""
    needed = {rank: sum(Arm(with_lora(base, rank)).step(text.train[:BATCH], 0.0).values()) for rank in RANKS}
    return min(RANKS, key=lambda rank: abs(needed[rank] - wanted))


def norms(model: nn.Module) -> list[float]:
    """Return the mean weight norm of each layer."""
    return lisa.layer_norms({name: float(tensor.detach().norm()) for name, tensor in model.named_parameters()})


# ---- the table ------------------------------------------------------------------------------------------------------


def pretrained(data: Artifact, path: Path) -> nn.Module:
    """Return the model that all arms tune, trained once on the books."""
    model = fresh(data)
    if path.exists():
        model.load_state_dict(load_file(path), strict=False)  # a tied matrix is there once
        return model
    print(json.dumps({"base": train(Arm(model), packed(data, manuals=False), BASE_STEPS, BASE_RATE)}), flush=True)
    save_file({name: tensor.detach().clone() for name, tensor in model.named_parameters()}, path)
    return model


def arms(base: nn.Module, text: Text, done: list[dict[str, Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (name, kind, settings) of every arm that can be run with what is known."""
    listed: list[tuple[str, str, dict[str, Any]]] = [("full AdamW", "full", {})]
    listed += [(f"LISA {active}", "lisa", {"active": active}) for active in (0, 2, 4)]
    two = [row for row in done if row["arm"] == "LISA 2"]
    if two:
        listed.append(("LoRA", "lora", {"rank": equal_rank(base, text, sum(two[0]["bytes"].values()))}))
    full = [row for row in done if row["arm"] == "full AdamW"]
    if full:
        weights = min(full, key=lambda row: row["bits_per_byte"])["importance"]
        listed.append(("LISA 2, measured", "lisa", {"active": 2, "weights": weights}))
    return listed


def one(base: nn.Module, text: Text, kind: str, rate: float, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Run one arm at one rate."""
    before = norms(base)
    if kind == "lora":
        arm = Arm(with_lora(base, settings["rank"]))
        return {**train(arm, text, steps, rate), "rank": settings["rank"]}
    arm = Arm(copy.deepcopy(base), **settings)
    result = train(arm, text, steps, rate)
    return {**result, "importance": lisa.importance(norms(arm.model), before)}


def work(steps: int, minutes: float, path: Path, store: Path) -> None:
    """Run what is missing until the time is used up."""
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * minutes
    data = prepared(PRESETS["cpu"], store)
    text = packed(data, manuals=True)
    for begin in ("pretrained", "scratch"):
        base = (
            pretrained(data, store / f"lisa-base-{LAYERS}x{LENGTH}x{BATCH}x{BASE_STEPS}.safetensors")
            if begin == "pretrained"
            else fresh(data)
        )
        for _ in range(2):  # the second round has the arms that need the first one's results
            known = [row for row in read(path) if row["begin"] == begin and row["steps"] == steps]
            for name, kind, settings in arms(base, text, known):
                for rate in RATES[kind]:
                    key = {"begin": begin, "arm": name, "rate": rate, "steps": steps}
                    if any(key.items() <= row.items() for row in read(path)):
                        continue
                    if time.monotonic() > until:
                        print("time is up; call again to go on")
                        return
                    row = {**key, **one(base, text, kind, rate, steps, settings)}
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the finished arms."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def markdown(found: list[dict[str, Any]]) -> str:
    """Return the table: the best rate of each arm."""
    lines = []
    for begin, steps in dict.fromkeys((row["begin"], row["steps"]) for row in found):
        lines += [
            f"From {begin}, {steps} steps:",
            "",
            "| arm | bits/byte | rate | weights + gradients + optimizer + activations, KB | of full | step, ms |",
            "|---|---|---|---|---|---|",
        ]
        rows = [row for row in found if (row["begin"], row["steps"]) == (begin, steps)]
        full = next((sum(row["bytes"].values()) for row in rows if row["arm"] == "full AdamW"), None)
        for name in dict.fromkeys(row["arm"] for row in rows):
            row = min((row for row in rows if row["arm"] == name), key=lambda row: row["bits_per_byte"])
            held = [round(part / 1024) for part in row["bytes"].values()]
            share = f"{sum(row['bytes'].values()) / full:.0%}" if full else ""
            shown = name + (f", rank {row['rank']}" if "rank" in row else "")
            parts = " + ".join(map(str, held)) + f" = {sum(held)}"
            lines.append(
                f"| {shown} | {row['bits_per_byte']:.3f} | {row['rate']:g} | {parts} | {share} | "
                f"{1000 * row['step_s']:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Run the missing arms, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--store", type=Path, default=CHECKOUT / ".ingot")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    wanted = parser.parse_args(arguments)
    if not wanted.table:
        work(wanted.steps, wanted.minutes, wanted.results, wanted.store)
    print(markdown(read(wanted.results)))


if __name__ == "__main__":
    main(sys.argv[1:])
