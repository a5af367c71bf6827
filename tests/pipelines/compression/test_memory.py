"""A model that does not fit into memory is compressed all the same: what has to fit is one block plus activations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from pipelines.core import artifact

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA covers mapped memory only on Linux")

WIDTH, BLOCKS = 256, 40
BLOCK = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * 2 * WIDTH)
"""Bytes of a block."""
ROOM = 6 * BLOCK + (24 << 20)
"""A block, its packed copies and float64 work on a layer; 24 MiB for hidden states, a shard, and the interpreter."""


@pytest.fixture(scope="module")
def parent(small: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """A small model, a large one in shards of 4 MB (a mapped shard counts as memory of the process), and text."""
    bench = small(width=64, ffn_width=128, layers=1)
    shape = ArchitectureConfig.model_validate(
        {"vocab_size": 260, "max_positions": 96, "bos_id": 256, "eos_id": 257, "pad_id": 258, "mask_id": 259}
        | {"width": WIDTH, "ffn_width": 2 * WIDTH, "layers": BLOCKS, "heads": 4}
    )
    folder = tmp_path_factory.mktemp("wide") / "build"
    build(shape, seed=0).save_pretrained(folder / "model", max_shard_size="4MB")
    final = folder.with_name("parent")
    artifact.publish(folder, final, stage="pretrain", node="p", identity={}, parents={}, summary={})
    return bench.parent.path, final, bench.prepare.path


def limited(action: str, parent: tuple[Path, ...], out: Path) -> subprocess.CompletedProcess[str]:
    """Run `bounded_child.py` with `ROOM` bytes to grow; freed memory goes back at once, whatever its size."""
    out.mkdir()
    script = Path(__file__).with_name("bounded_child.py")
    asked = [action, *parent, out, ROOM]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
    return subprocess.run(
        [sys.executable, str(script), *map(str, asked)], capture_output=True, text=True, check=False, env=environment
    )


def test_a_model_larger_than_the_memory_limit_is_compressed_block_by_block(
    parent: tuple[Path, ...], tmp_path: Path
) -> None:
    assert ROOM < 0.4 * BLOCKS * BLOCK
    whole = limited("load", parent, tmp_path / "load")
    assert whole.returncode != 0, "the limit must bite, or nothing is shown"
    assert "memory" in whole.stderr.lower()
    done = limited("compress", parent, tmp_path / "compress")
    assert done.returncode == 0, done.stderr[-2000:]
    (first, *_) = sorted((tmp_path / "compress" / "large" / "model").glob("model-*.safetensors"))
    with safe_open(first, framework="pt") as file:
        assert any(name.endswith("weight_packed") for name in file.keys())  # noqa: SIM118 - the handle is no mapping
