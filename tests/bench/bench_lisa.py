"""LISA against full training: time of the backward pass, and bytes of optimizer state.

    OMP_NUM_THREADS=1 python tests/bench/bench_lisa.py [--preset 10m] [--active 2] [--rounds 8]

The same model trains one step with all layers and one with `--active` of its layers, turn by turn; a ratio is the
median over rounds. What can be saved is the weight gradients of frozen layers, about a third of a layer's work:
gradients still flow through every layer down to the embedding, which always trains. The figure to compare with is
printed beside it, from the model's shape: (full - weight gradients of frozen layers) / full, matrix products only.
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

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig, preset
from models.objectives.causal import next_tokens
from models.optim import lisa
from models.optim.lamb import Lamb
from pipelines.training.data_loader import Batch
from pipelines.training.loss_module import LossModule

VOCABULARY, LENGTH, BATCH = 4096, 256, 4
IDS = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}


def arm(config: ArchitectureConfig, active: list[int] | None) -> tuple[Callable[[], dict[str, float]], Lamb]:
    """Return a step that gives the seconds of its parts, and its optimizer."""
    objective = LossModule(build(config, seed=0))
    optimizer = Lamb(lisa.layer_groups(objective.named_parameters()), lr=1e-3)
    if active is not None:
        names = lisa.active_names([name for name, _ in objective.named_parameters()], active)
        lisa.set_requires_grad(objective, names)
        optimizer.set_active(names)
    tokens = torch.randint(4, VOCABULARY, (BATCH, LENGTH)).numpy()
    batch = Batch.of(tokens, next_tokens(tokens, bos_id=0, pad_id=2), 2)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def step() -> dict[str, float]:
        marks = [clock()]
        loss = objective(batch.inputs_BT, batch.targets_BT) / batch.targets
        marks.append(clock())
        loss.backward()
        marks.append(clock())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(clock())
        parts = zip(("forward", "backward", "step"), marks, marks[1:], strict=False)
        return {part: end - begin for part, begin, end in parts}

    return step, optimizer


def expected(config: ArchitectureConfig, active: int) -> float:
    """Return the backward pass's share of matrix products that is left, from the shape."""
    width, ffn = config.width, config.ffn_width
    layer = 2 * width * width + 2 * width * config.key_heads * config.head_size + 3 * width * ffn
    attention = 2 * width * LENGTH / 2
    head = config.vocab_size * width
    full = config.layers * 2 * (layer + attention) + 2 * head
    return 1 - (config.layers - active) * layer / full


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="10m")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    shape = preset("decoder", arguments.preset, {"layers": arguments.layers}).model_dump()
    config = ArchitectureConfig(**shape, vocab_size=VOCABULARY, max_positions=LENGTH, **IDS)
    active = list(lisa.draw(0, 0, arguments.layers, arguments.active))
    full, full_optimizer = arm(config, None)
    part, part_optimizer = arm(config, active)
    pairs = [(full(), part()) for _ in range(arguments.rounds + 2)][2:]
    figures: dict[str, Any] = {"preset": arguments.preset, "layers": arguments.layers, "active": active}
    for name in ("forward", "backward", "step"):
        figures[f"{name} s, full"] = round(statistics.median(one[name] for one, _ in pairs), 4)
        figures[f"{name} ratio"] = round(statistics.median(other[name] / one[name] for one, other in pairs), 3)
    figures["backward ratio by matrix products"] = round(expected(config, arguments.active), 3)
    figures["state bytes, full"] = full_optimizer.state_bytes()
    figures["state ratio"] = round(part_optimizer.state_bytes() / full_optimizer.state_bytes(), 4)
    figures["share of active parameters"] = round(
        sum(f.numel for f in part_optimizer.fragments if part_optimizer.fragment_state(f))
        / sum(f.numel for f in full_optimizer.fragments),
        4,
    )
    print(json.dumps(figures | {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    main()
