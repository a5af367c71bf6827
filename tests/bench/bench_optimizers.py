"""Times an optimizer step against torch's fused AdamW, in one run: `python tests/bench/bench_optimizers.py [MILLIONS]`.

The model is a list of tensors shaped like a decoder's: matrices of width x 4 width and width x width, and gains. Each
figure is the least over rounds in which the arms take turns, so that a busy machine slows all alike.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from models.optim.adamw import AdamW
from models.optim.lamb import Lamb
from models.optim.lars import Lars

ROUNDS = 7


def tensors(millions: int, device: str) -> list[tuple[str, nn.Parameter]]:
    """Return named parameters of about so many million elements, gradients set."""
    width = 256 if millions <= 20 else 512
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
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


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


def measure(millions: int, device: str) -> dict[str, float]:
    """Return the least milliseconds of each arm, and ratios to torch's fused AdamW."""
    parameters = tensors(millions, device)
    plain = [parameter for _, parameter in parameters]
    arms: dict[str, torch.optim.Optimizer] = {
        "torch fused AdamW": torch.optim.AdamW(plain, fused=True),
        "torch foreach AdamW": torch.optim.AdamW(plain, foreach=True),
        "AdamW": AdamW(parameters),
        "Lars": Lars(parameters),
        "Lamb": Lamb(parameters),
        "Lamb, clipping": Lamb(parameters, max_grad_norm=1.0),
        "per-tensor LAMB": PerTensorLamb(plain, {"lr": 1e-3}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(ROUNDS + 1):
        for name, optimizer in arms.items():
            taken = timed(optimizer.step, device)
            if number:
                seconds[name].append(taken)
    least = {name: min(times) * 1e3 for name, times in seconds.items()}
    base = least["torch fused AdamW"]
    return {
        "parameters": sum(parameter.numel() for parameter in plain),
        **{f"{name}, ms": round(value, 2) for name, value in least.items()},
        **{f"{name} / fused AdamW": round(value / base, 2) for name, value in least.items()},
    }


def main() -> None:
    """Print one JSON line for each size."""
    sizes = [int(argument) for argument in sys.argv[1:]] or [10, 40]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for size in sizes:
        figures = {"device": device, "threads": torch.get_num_threads(), **measure(size, device)}
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
