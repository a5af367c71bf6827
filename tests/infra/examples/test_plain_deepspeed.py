"""The example script on two real ranks ends with the weights of the same training in one process without DeepSpeed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from models.optim.lamb import Lamb
from pipelines.core.launcher import launch

SCRIPT = Path(__file__).parents[3] / "infra" / "examples" / "plain_deepspeed.py"
STEPS = 20


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The script as a module, on one thread."""
    spec = importlib.util.spec_from_file_location("plain_deepspeed", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def train(example: Any, steps: int) -> nn.Module:
    """Train in this process, without DeepSpeed."""
    torch.manual_seed(example.SEED)
    model: nn.Module = example.Model()
    optimizer = Lamb(model.named_parameters(), lr=example.RATE, weight_decay=example.DECAY)
    for step in range(steps):
        if step % example.INTERVAL == 0:
            example.activate(model, optimizer, step)
        optimizer.zero_grad()
        model(example.batch(step)).backward()
        optimizer.step()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_give_the_weights_of_one_process(stage: int, example: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), f"--stage={stage}", f"--steps={STEPS}", f"--save={tmp_path / 'w'}"]
    launch(command, world_size=2, log_dir=tmp_path, env={"OMP_NUM_THREADS": "1"})
    found = load_file(tmp_path / "w")
    alone = dict(train(example, STEPS).named_parameters())
    assert set(found) == set(alone)
    for name, tensor in alone.items():
        torch.testing.assert_close(found[name], tensor.detach(), atol=1e-5, rtol=0, msg=name)
    log = (tmp_path / "rank-0.log").read_text()
    assert [int(step) for step in re.findall(r"step (\d+): loss", log)] == [10, 20]


def test_the_example_learns(example: Any) -> None:
    before, after = (train(example, steps)(example.batch(99)).item() for steps in (0, 20))
    assert after < before - 0.1


def test_a_layer_that_was_not_drawn_keeps_every_bit(example: Any) -> None:
    start, end = (dict(train(example, steps).named_parameters()) for steps in (0, 2 * example.INTERVAL))
    drawn = {layer for interval in range(2) for layer in example.lisa.draw(0, interval, 4, 2)}
    assert drawn == {0, 1, 2}
    assert {name for name in start if torch.equal(start[name], end[name])} == {n for n in start if "layers.3." in n}


def test_its_help_says_how_to_start_it() -> None:
    said = subprocess.run([sys.executable, str(SCRIPT), "-h"], capture_output=True, text=True, check=True).stdout
    assert "--nproc-per-node 2 infra/examples/plain_deepspeed.py" in said
