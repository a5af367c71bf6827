"""One GPU: model FLOPs utilisation of a 1 B decoder in bf16, where its time goes, and the optimizers' memory speed.

    python tests/bench/bench_gpu.py                        # on a CUDA machine; needs torch and transformers only
    python tests/bench/bench_gpu.py --tiny --device cpu    # the same code on a small model, to see that it runs

Two parts, one JSON line each:

* `train`: forward and backward of `models.architectures` in bf16 over fp32 masters, as it is, compiled, and compiled
  with the loss in chunks; tokens/s, MFU over the data sheet's dense bf16 peak, the time split and the peak memory.
* `optimizer`: a step of every optimizer on the same tensors, as a share of the time that 40 bytes a parameter take at
  the measured copy bandwidth (1 is the floor of LAMB, 28/40 that of AdamW), beside torch's fused AdamW, a LAMB in
  apex's manner (one multi-tensor pass for moments and update, one to apply), and DeepSpeed's FusedLamb where it builds.

Without CUDA it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig, count_parameters, flops_per_token, preset
from models.objectives.causal import next_tokens
from models.optim.adamw import AdamW
from models.optim.lamb import Lamb
from models.optim.lars import Lars
from pipelines.training.data_loader import Batch
from pipelines.training.loss_module import LossModule
from pipelines.training.metrics import TimeSplit, memory_bytes, peak

LAMB_BYTES = 40
"""Traffic of LAMB for each parameter: m, v, g and x read, m and v written; then m, v and x read, x written."""
VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {"compiled": False, "loss_chunk": None},
    "compiled": {"compiled": True, "loss_chunk": None},
    "compiled, loss in chunks": {"compiled": True, "loss_chunk": 4096},
}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median seconds of a call, after one that does not count."""
    call()
    taken = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


# ---- training -----------------------------------------------------------------------------------------------------


def architecture(name: str, length: int, vocabulary: int, **changes: Any) -> ArchitectureConfig:
    """Return a decoder of a preset."""
    ids = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    return ArchitectureConfig(
        **preset("decoder", name, changes).model_dump(), vocab_size=vocabulary, max_positions=length, **ids
    )


def trained(
    config: ArchitectureConfig,
    device: torch.device,
    batch_size: int,
    rounds: int,
    *,
    compiled: bool,
    loss_chunk: int | None,
) -> dict[str, Any]:
    """Train a few steps and return the figures; weights are fp32, arithmetic is bf16."""
    objective = LossModule(build(config, seed=0), loss_chunk).to(device)
    if compiled:
        objective.compile_model()
    optimizer = Lamb(objective.named_parameters(), lr=1e-4, max_grad_norm=1.0, compiled=device.type == "cuda")
    tokens = torch.randint(4, config.vocab_size, (batch_size, config.max_positions)).numpy()
    batch = Batch.of(tokens, next_tokens(tokens, bos_id=0, pad_id=2), 2).to(device)
    split = TimeSplit(device)

    def step() -> None:
        with split("forward"), torch.autocast(device.type, dtype=torch.bfloat16):
            loss = objective(batch.inputs_BT, batch.targets_BT) / batch.targets
        with split("backward"):
            loss.backward()
        with split("step"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    step()
    split.take()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    each = seconds(step, device, rounds)
    parts = {part: round(total / (rounds + 1), 5) for part, total in split.take().items()}
    rate = tokens.size / each
    top = peak(device, "bf16")
    return {
        "tokens_per_s": round(rate),
        "mfu": round(rate * flops_per_token(config, config.max_positions) / top.flops, 4),
        "peak": top.source,
        "seconds": parts,
        "memory_gb": round(memory_bytes(device) / 1e9, 2),
    }


# ---- optimizers ---------------------------------------------------------------------------------------------------


class ApexLikeLamb(torch.optim.Optimizer):
    """LAMB in two multi-tensor passes; the update overwrites the gradient, as in apex."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        weights: list[Tensor] = self.param_groups[0]["params"]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if not self.state:
            for weight in weights:
                self.state[weight].update(m=torch.zeros_like(weight), v=torch.zeros_like(weight))
        first = [self.state[weight]["m"] for weight in weights]
        second = [self.state[weight]["v"] for weight in weights]
        torch._foreach_lerp_(first, gradients, 0.1)
        torch._foreach_mul_(second, 0.999)
        torch._foreach_addcmul_(second, gradients, gradients, 0.001)
        torch._foreach_copy_(gradients, second)
        torch._foreach_sqrt_(gradients)
        torch._foreach_add_(gradients, 1e-6)
        torch._foreach_reciprocal_(gradients)
        torch._foreach_mul_(gradients, first)
        torch._foreach_add_(gradients, weights, alpha=0.01)
        norms = zip(torch._foreach_norm(weights), torch._foreach_norm(gradients), strict=True)
        torch._foreach_mul_(gradients, [weight / update * -1e-4 for weight, update in norms])
        torch._foreach_add_(weights, gradients)


def deepspeed_lamb(parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """Return DeepSpeed's FusedLamb, or None where it cannot be built."""
    try:
        from deepspeed.ops.lamb import FusedLamb

        return FusedLamb(parameters, lr=1e-4)
    except Exception as error:  # noqa: BLE001 - a missing compiler, package or GPU: there is no figure then
        print(f"no DeepSpeed FusedLamb here: {type(error).__name__}", file=sys.stderr)
        return None


def copy_bandwidth(device: torch.device, elements: int) -> float:
    """Return the bytes per second of a copy, read and write counted."""
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    return 8 * elements / seconds(lambda: target.copy_(source), device, 10)


def stepped(config: ArchitectureConfig, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return milliseconds of every optimizer, and the floor of 40 bytes a parameter as a share of them."""
    model = build(config, seed=0).to(device)
    named = list(model.named_parameters())
    plain = [parameter for _, parameter in named]
    for parameter in plain:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    count = sum(parameter.numel() for parameter in plain)
    bandwidth = copy_bandwidth(device, min(count, 1 << 28))
    made: dict[str, Callable[[], torch.optim.Optimizer | None]] = {
        "torch fused AdamW": lambda: torch.optim.AdamW(plain, fused=True),
        "AdamW": lambda: AdamW(named),
        "Lars": lambda: Lars(named),
        "Lamb": lambda: Lamb(named),
        "Lamb compiled": lambda: Lamb(named, compiled=True),
        "LAMB, apex-like": lambda: ApexLikeLamb(plain, {}),
        "DeepSpeed FusedLamb": lambda: deepspeed_lamb(plain) if device.type == "cuda" else None,
    }
    arms: dict[str, Any] = {}
    for name, make in made.items():
        optimizer = make()
        if optimizer is not None:
            each = seconds(optimizer.step, device, rounds)
            arms[name] = {"ms": round(each * 1e3, 3), "of_floor": round(LAMB_BYTES * count / bandwidth / each, 3)}
        del optimizer
    return {"parameters": count, "copy_gb_per_s": round(bandwidth / 1e9, 1), "arms": arms}


def main() -> int:
    """Print one JSON line for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one small layer, two rounds")
    parser.add_argument("--preset", default="1b")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: run this on a GPU machine, or with --tiny --device cpu", file=sys.stderr)
        return 2
    device = torch.device(arguments.device)
    config = architecture(arguments.preset, arguments.length, 32_000)
    batch_size, rounds = arguments.batch_size, arguments.rounds
    if arguments.tiny:
        config, batch_size, rounds = architecture("0.5m", 64, 512, layers=1), 2, 2
    torch.set_float32_matmul_precision("high")
    shown = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__}
    shown |= {"parameters": count_parameters(config), "tokens_per_step": batch_size * config.max_positions}
    for name, options in VARIANTS.items():
        print(
            json.dumps(
                {"part": "train", "variant": name, **shown, **trained(config, device, batch_size, rounds, **options)}
            )
        )
        sys.stdout.flush()
    print(json.dumps({"part": "optimizer", **shown, **stepped(config, device, rounds)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
