"""Times optimizer steps against torch's fused AdamW, in one run.

    OMP_NUM_THREADS=1 python tests/bench/bench_optimizers.py 1.6 10 40 300 --json

The model is a list of tensors shaped like a decoder's: matrices of width x 4 width and width x width, and gains. The
arms take turns, so that a busy machine slows all alike; a ratio is the median over rounds of the ratio to fused AdamW
in the same round. On one CPU thread the time is the CPU time of the process, so that waiting for a core does not count.
Every arm holds its own moments, on the same weights and gradients: 300 million parameters need
20 GB with all arms, so large sizes drop the arms that are not asked for (`--arms`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models.optim.adamw import AdamW
from models.optim.lamb import Lamb
from models.optim.lars import Lars

BASE = "torch fused AdamW"


def tensors(millions: float, device: str) -> list[tuple[str, nn.Parameter]]:
    """Return named parameters of about so many million elements, gradients set."""
    width = 256 if millions <= 20 else 512 if millions <= 100 else 1024
    shapes: list[tuple[int, ...]] = []
    while sum(torch.Size(shape).numel() for shape in shapes) < millions * 1_000_000:
        shapes += [(width, width)] * 4 + [(width, 4 * width)] * 2 + [(width,)] * 2
    named = [
        (f"layers.{i}.w", nn.Parameter(torch.randn(shape, device=device) * 0.02)) for i, shape in enumerate(shapes)
    ]
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return named


def timed(step: Callable[[], object], device: str) -> float:
    """Return the seconds of one call."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


class PerTensorLamb(torch.optim.Optimizer):
    """LAMB as usually written: a Python loop over whole tensors, no blocks, no check for non-finite values."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state.update(t=0, m=torch.zeros_like(parameter), v=torch.zeros_like(parameter))
            state["t"] += 1
            state["m"].lerp_(parameter.grad, 0.1)
            state["v"].mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
            root = (state["v"] / (1 - 0.999 ** state["t"])).sqrt_().add_(1e-6)
            update = (state["m"] / (1 - 0.9 ** state["t"])).div_(root).add_(parameter, alpha=0.01)
            ratio = parameter.norm() / update.norm()
            parameter.sub_(update.mul_(ratio), alpha=self.param_groups[0]["lr"])


def clipped(plain: list[nn.Parameter]) -> Callable[[], object]:
    """Return AdamW's fused step after torch's clipping, which scales gradients even where the norm is small."""
    optimizer = torch.optim.AdamW(plain, fused=True)

    def step() -> None:
        nn.utils.clip_grad_norm_(plain, 1e9)
        optimizer.step()

    return step


def arms(parameters: list[tuple[str, nn.Parameter]]) -> dict[str, Callable[[], Callable[[], object]]]:
    """Return what makes each arm's step, by name."""
    plain = [parameter for _, parameter in parameters]
    return {
        BASE: lambda: torch.optim.AdamW(plain, fused=True).step,
        "torch foreach AdamW": lambda: torch.optim.AdamW(plain, foreach=True).step,
        "torch clip + fused AdamW": lambda: clipped(plain),
        "AdamW": lambda: AdamW(parameters).step,
        "Lamb": lambda: Lamb(parameters).step,
        "Lamb clip": lambda: Lamb(parameters, max_grad_norm=1e9).step,
        "Lamb compiled": lambda: Lamb(parameters, compiled=True).step,
        "Lars": lambda: Lars(parameters).step,
        "Lars compiled": lambda: Lars(parameters, compiled=True).step,
        "per-tensor LAMB": lambda: PerTensorLamb(plain, {"lr": 1e-3}).step,
    }


def measure(millions: float, device: str, rounds: int, wanted: list[str]) -> dict[str, Any]:
    """Return medians over the rounds: milliseconds of each arm, and the ratio to torch's fused AdamW."""
    parameters = tensors(millions, device)
    steps = {name: make() for name, make in arms(parameters).items() if name in (BASE, *wanted) or not wanted}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step, device))
    figures = {
        name: {
            "ms": round(statistics.median(times) * 1e3, 2),
            "least_ms": round(min(times) * 1e3, 2),
            "ratio": round(statistics.median(a / b for a, b in zip(times, seconds[BASE], strict=True)), 2),
            "least_ratio": round(min(times) / min(seconds[BASE]), 2),
        }
        for name, times in seconds.items()
    }
    return {"parameters": sum(parameter.numel() for _, parameter in parameters), "arms": figures}


def main() -> None:
    """Print a table, or one JSON line, for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("millions", nargs="*", type=float, default=[1.6, 10.0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--arms", nargs="*", default=[], help="only these, beside torch's fused AdamW")
    parser.add_argument("--json", action="store_true", help="one JSON line for each size")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for size in arguments.millions:
        load = os.getloadavg()[0]
        figures = measure(size, device, arguments.rounds, arguments.arms)
        figures |= {"device": device, "threads": torch.get_num_threads(), "load": [round(load, 1), os.getloadavg()[0]]}
        if arguments.json:
            print(json.dumps(figures), flush=True)
            continue
        print(f"{figures['parameters']:,} parameters, {device}, {figures['threads']} threads, load {figures['load']}")
        for name, arm in figures["arms"].items():
            print(
                f"  {name:26s} {arm['ms']:9.2f} ms, {arm['ratio']:5.2f} of fused AdamW "
                f"(least: {arm['least_ms']:.2f} ms, {arm['least_ratio']:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
