"""One of three ranks that hold uneven parts of two tensors: `export_worker.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import distributed

from models.optim.fragment_layout import Fragment, Layout
from models.optim.lamb import Lamb
from pipelines.training.distributed import Ranks
from pipelines.training.model_export import gather_weights

WHOLE = {
    "model.a": torch.tensor([[0.0, -0.0, 1e-45, -1.5, float("inf")], [3e38, float("nan"), 2.0, -7.25, 0.1]]),
    "model.b": torch.tensor([-0.0, 5.0, 1 / 3]),
}
PARTS = [[("model.a", 0, 1)], [("model.a", 1, 9), ("model.b", 0, 1)], [("model.b", 1, 2)]]


def main() -> None:
    distributed.init_process_group("gloo")
    ranks = Ranks.current(torch.device("cpu"))
    parts = PARTS[ranks.rank]
    partition = torch.cat([WHOLE[name].flatten()[start : start + numel] for name, start, numel in parts])
    fragments, offset = [], 0
    for name, start, numel in parts:
        fragments.append(Fragment(name, tuple(WHOLE[name].shape), start, numel, partition, offset))
        offset += numel
    shapes = {name: tuple(tensor.shape) for name, tensor in WHOLE.items()}

    def reduce(sums: torch.Tensor) -> torch.Tensor:
        distributed.all_reduce(sums)
        return sums

    optimizer = Lamb([("model.a", torch.nn.Parameter(partition))])
    optimizer.bind(Layout(tuple(fragments), shapes, dict.fromkeys(shapes, partition), reduce))
    gathered = gather_weights(optimizer, ranks)
    counts = ranks.gathered(float(len(gathered)))
    if ranks.rank == 0:
        result = {
            "gathered": {name: tensor.flatten().view(torch.int32).tolist() for name, tensor in gathered.items()},
            "expected": {n.removeprefix("model."): t.flatten().view(torch.int32).tolist() for n, t in WHOLE.items()},
            "others": [int(count) for count in counts[1:]],
        }
        Path(sys.argv[1], "out.json").write_text(json.dumps(result))
    ranks.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
