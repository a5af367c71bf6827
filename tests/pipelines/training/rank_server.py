"""Runs scenarios on real ranks for tests: imports torch once, then forks the ranks of each request in milliseconds.

Reads one JSON request per line from stdin, `{"scenario", "world", "arguments", "environment", "folder"}`, runs the
ranks with gloo over a file rendezvous, and answers with one line `{"codes": [...], "results": [...]}`. A rank that is
still there a few seconds after another one died is killed, as the launcher would do.

The model is a handful of odd-sized tensors; the gradient of element i of a tensor at a step is a fixed function of
both, so runs on any number of ranks are comparable. Three layouts cut the tensors as ZeRO does.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from models.optim.adamw import AdamW
from models.optim.fragment_layout import Fragment, Layout
from models.optim.sharded_optimizer import FragmentOptimizer
from pipelines.core.errors import IngotError
from pipelines.core.fault_injection import fault_point
from pipelines.training.checkpoint import Checkpoints

SHAPES = {
    "embed.weight": (7, 3),
    "layers.0.weight": (5, 4),
    "layers.1.weight": (5, 4),
    "norm|gain": (3,),
    "scale": (1,),
}
SIBLING_GRACE_S = 3.0
DEADLINE_S = 60.0


def initial(name: str) -> Tensor:
    """The tensor's first values: a function of its name."""
    generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    return torch.randn(math.prod(SHAPES[name]), generator=generator)


def gradient(name: str, step: int) -> Tensor:
    """The whole flat gradient of a tensor at a step."""
    return torch.sin(torch.arange(math.prod(SHAPES[name]), dtype=torch.float32) * 0.7 + step + len(name))


def whole(rank: int, world: int) -> tuple[list[tuple[str, int, int]], list[list[str]]]:
    """ZeRO 0: every rank holds every tensor; a partition for each."""
    return [(name, 0, math.prod(shape)) for name, shape in SHAPES.items()], [[name] for name in SHAPES]


def flat(rank: int, world: int) -> tuple[list[tuple[str, int, int]], list[list[str]]]:
    """ZeRO 1 and 2: all tensors end to end, cut into one even slice per rank."""
    total = sum(math.prod(shape) for shape in SHAPES.values())
    share = -(-total // world)
    low, high = rank * share, (rank + 1) * share
    cuts, position = [], 0
    for name, shape in SHAPES.items():
        end = position + math.prod(shape)
        first, last = max(low, position), min(high, end)
        if first < last:
            cuts.append((name, first - position, last - first))
        position = end
    return cuts, [list(SHAPES)]


def each(rank: int, world: int) -> tuple[list[tuple[str, int, int]], list[list[str]]]:
    """ZeRO 3: each tensor cut into even slices; the last ones may be short, or empty."""
    cuts = []
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        share = -(-size // world)
        first, last = min(rank * share, size), min((rank + 1) * share, size)
        cuts.append((name, first, last - first))
    return cuts, [[name] for name in SHAPES]


WRITE_S = 1.9
"""A save that blocked for longer than this waited for a write that a test delays by two seconds."""

LAYOUTS = {"whole": whole, "flat": flat, "each": each}


def make(layout: str, rank: int, world: int) -> FragmentOptimizer:
    """An optimizer over the toy tensors, cut as this rank holds them."""
    cuts, groups = LAYOUTS[layout](rank, world)
    fragments, partition_of = [], {}
    for names in groups:
        mine = [cut for cut in cuts if cut[0] in names]
        partition = torch.nn.Parameter(torch.zeros(sum(cut[2] for cut in mine) + 2))  # two elements of padding
        partition_of |= dict.fromkeys(names, partition)
        offset = 0
        for name, start, numel in mine:
            fragments.append(Fragment(name, SHAPES[name], start, numel, partition, offset))
            fragments[-1].master.copy_(initial(name)[start : start + numel])
            offset += numel
    optimizer = AdamW(
        list({id(partition): partition for partition in partition_of.values()}.values()), lr=0.1, weight_decay=0.1
    )
    optimizer.bind(Layout(tuple(fragments), SHAPES, partition_of, None if layout == "whole" or world == 1 else summed))
    return optimizer


def summed(tensor: Tensor) -> Tensor:
    """Sum over the ranks."""
    distributed.all_reduce(tensor)
    return tensor


def update(optimizer: FragmentOptimizer, step: int) -> None:
    """One step with the gradients of that step."""
    for partition in optimizer.layout.partitions:
        partition.grad = torch.zeros_like(partition)
    for fragment in optimizer.fragments:
        end = fragment.start + fragment.numel
        fragment.of(fragment.partition.grad).copy_(gradient(fragment.name, step)[fragment.start : end])
    optimizer.step()


def digests(optimizer: FragmentOptimizer, world: int, layout: str) -> dict[str, str]:
    """sha256 of every whole tensor and moment, put together from all ranks; the same on each."""
    found = {}
    for name, shape in SHAPES.items():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            full = torch.zeros(2, math.prod(shape))
            for fragment in (fragment for fragment in optimizer.fragments if fragment.name == name):
                state = {"master": fragment.master, **optimizer.fragment_state(fragment)}
                if kind in state:
                    span = slice(fragment.start, fragment.start + fragment.numel)
                    full[0, span], full[1, span] = state[kind], 1.0
            if world > 1 and layout != "whole":
                distributed.all_reduce(full)
            if full[1].any():
                assert full[1].eq(1.0).all(), f"{name} {kind}: not every element is held exactly once"
                found[f"{name}/{kind}"] = hashlib.sha256(full[0].numpy().tobytes()).hexdigest()
    return found


def train(
    rank: int,
    world: int,
    folder: str,
    *,
    layout: str,
    steps: int,
    every: int = 2,
    keep: int = 2,
    active: list[str] | None = None,
    wait: bool = True,
) -> dict[str, Any]:
    """Train from the newest checkpoint to `steps`; report what was loaded and what came out."""
    checkpoints, optimizer = Checkpoints(Path(folder), keep), make(layout, rank, world)
    saved = checkpoints.load_latest(optimizer, rank=rank, world=world)
    done = saved["step"] if saved else 0
    loaded, blocked = digests(optimizer, world, layout), []
    optimizer.set_active(active)
    for step in range(done, steps):
        update(optimizer, step)
        fault_point("train.after_step", step=step + 1)
        if (step + 1) % every == 0:
            started = time.monotonic()
            checkpoints.save(step + 1, optimizer, {"note": f"at {step + 1}"}, rank=rank, world=world, wait=wait)
            blocked.append(time.monotonic() - started > WRITE_S)
    checkpoints.finish()
    return {
        "resumed_at": done,
        "saved": saved,
        "loaded": loaded,
        "final": digests(optimizer, world, layout),
        "counters": optimizer.counters(),
        "fallbacks": checkpoints.fallbacks,
        "steps": checkpoints.steps(),
        "blocked": blocked,
        "state_bytes": optimizer.state_bytes(),
    }


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {"train": train}


def run_rank(request: dict[str, Any], rank: int, rendezvous: Path, answer: Path) -> int:
    """Body of a forked rank; returns its exit code."""
    world = request["world"]
    os.environ.update(request["environment"], RANK=str(rank))
    torch.set_num_threads(1)
    if world > 1:
        distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        result = SCENARIOS[request["scenario"]](rank, world, request["folder"], **request["arguments"])
        code = 0
    except IngotError as error:
        result, code = {"error": type(error).__name__, "message": str(error)}, error.exit_code
    except Exception as error:  # noqa: BLE001 - the test sees it
        result, code = {"error": type(error).__name__, "message": traceback.format_exc()}, 1
    answer.write_text(json.dumps(result))
    return code


def serve(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Fork the ranks, wait for them, and return their exit codes and results."""
    answers = [scratch / f"answer-{rank}.json" for rank in range(request["world"])]
    for path in (*answers, scratch / "rendezvous"):
        path.unlink(missing_ok=True)
    children = {}
    for rank in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            os._exit(run_rank(request, rank, scratch / "rendezvous", answers[rank]))
        children[pid] = rank
    codes: dict[int, int] = {}
    deadline = time.monotonic() + DEADLINE_S
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
            if codes[max(codes)] != 0 or any(codes.values()):
                deadline = min(deadline, time.monotonic() + SIBLING_GRACE_S)
        elif time.monotonic() > deadline:
            for late in children:
                os.kill(late, 9)
            deadline = math.inf
        else:
            time.sleep(0.005)
    results = [json.loads(path.read_text()) if path.exists() else None for path in answers]
    return {"codes": [codes[rank] for rank in range(request["world"])], "results": results}


if __name__ == "__main__":
    torch.set_num_threads(1)
    update(make("whole", 0, 1), 0)  # torch imports its compiler at the first use of an optimizer: seconds, once
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line), Path(sys.argv[1]))), flush=True)
