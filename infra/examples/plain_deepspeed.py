"""LAMB and LISA in a plain DeepSpeed script: nothing of Ingot but an optimizer, `lisa` and `attach`.

    python -m torch.distributed.run --nproc-per-node 2 infra/examples/plain_deepspeed.py --stage 3 --steps 40

What differs from any other DeepSpeed script is marked (1) to (4). Any number of ranks and any ZeRO stage gives the
weights of one process, to rounding.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.optim import lisa
from models.optim.lamb import Lamb

VOCABULARY, WIDTH, LAYERS, LENGTH, BATCH = 64, 48, 4, 16, 12
RATE, DECAY, ACTIVE, INTERVAL, SEED = 0.03, 0.01, 2, 5, 0


class Layer(nn.Module):
    """A residual feed-forward layer over each token and the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.up, self.down = nn.Linear(2 * WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return [B, T, D]."""
        both = torch.cat([x_BTD, functional.pad(x_BTD, (0, 0, 1, 0))[:, :-1]], dim=-1)
        return x_BTD + self.down(functional.gelu(self.up(self.norm(both))))


class Model(nn.Module):
    """A small language model; its layers are called `layers.N`, by which LISA finds them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the mean loss of predicting each next token."""
        x_BTD = self.embedding(tokens_BT[:, :-1])
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return functional.cross_entropy(self.head(x_BTD).flatten(0, 1), tokens_BT[:, 1:].flatten())


def batch(step: int) -> Tensor:
    """Return the tokens of a step on all ranks, [B, T + 1]: counting, from random starts in random strides."""
    generator = torch.Generator().manual_seed(step)
    start, stride = (torch.randint(1, VOCABULARY, (BATCH, 1), generator=generator) for _ in range(2))
    return (start + stride * torch.arange(LENGTH + 1)) % VOCABULARY


def activate(model: nn.Module, optimizer: Lamb, step: int) -> None:
    """Draw the layers of a step's interval; the same on every rank, without a word between them."""
    layers = lisa.draw(SEED, step // INTERVAL, LAYERS, ACTIVE)
    names = lisa.active_names([name for name, _ in model.named_parameters()], layers)
    lisa.set_requires_grad(model, names)
    optimizer.set_active(names)


def main() -> None:
    """Train, and save the whole weights on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2, choices=range(4), help="ZeRO stage")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save", type=Path, help="safetensors file for the trained weights")
    arguments = parser.parse_args()

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from pipelines.training.zero_binding import attach, skip_shared_memory_build

    skip_shared_memory_build()  # else the first CPU run compiles it for minutes
    deepspeed.init_distributed(verbose=False)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(SEED)
    model = Model()
    # (1) One parameter group for each layer, so that ZeRO 1 and 2 spread every layer over all ranks.
    optimizer = Lamb(lisa.layer_groups(model.named_parameters()), lr=RATE, weight_decay=DECAY)
    config = {
        "train_micro_batch_size_per_gpu": BATCH // world,
        "zero_optimization": {"stage": arguments.stage},
        "zero_allow_untested_optimizer": True,  # (2) ours are tested with ZeRO; DeepSpeed cannot know
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    attach(engine)  # (3) find every tensor in ZeRO's flat partitions, or refuse and say why
    for step in range(arguments.steps):
        if step % INTERVAL == 0:
            activate(engine.module, optimizer, step)  # (4) LISA: without this line it is plain LAMB
        loss = engine(batch(step).to(engine.device).chunk(world)[rank])
        engine.backward(loss)
        engine.step()
        if rank == 0 and (step + 1) % 10 == 0:
            size = optimizer.state_bytes()
            print(f"step {step + 1}: loss {loss.item():.3f}, optimizer state on this rank {size} bytes", flush=True)
    if arguments.save:
        save(engine, arguments.save)
    torch.distributed.destroy_process_group()


def save(engine: Any, path: Path) -> None:
    """Write the whole weights on rank 0."""
    import deepspeed
    from safetensors.torch import save_file

    parameters = dict(engine.module.named_parameters())
    sharded = list(parameters.values()) if engine.zero_optimization_stage() == 3 else []
    with deepspeed.zero.GatheredParameters(sharded):
        if torch.distributed.get_rank() == 0:
            save_file({name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}, path)


if __name__ == "__main__":
    main()
