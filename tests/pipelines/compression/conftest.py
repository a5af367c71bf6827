"""Bench C of the compression tests: a byte-level decoder that is really trained, and small untrained models for layout.

The bench reads about 1 MB of the Python standard library's source, every 20th block of 4 KB held out, and takes 250
steps of 12 sequences of 96 bytes (about half a minute on one core, once per session). It reaches about 1.7 nats per
byte: well enough that 3-bit rounding shows (see `test_quality.py`).
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from pipelines import artifact
from pipelines.artifact import Artifact
from pipelines.compression.config import CompressConfig
from pipelines.compression.stage import run
from pipelines.data import shards
from pipelines.stage import StageContext

LENGTH = 96
IDS = {"bos_id": 256, "eos_id": 257, "pad_id": 258, "mask_id": 259}
VOCABULARY = 260
STEPS, RATE = 250, 3e-3


@dataclass(frozen=True)
class Bench:
    """A parent with its data."""

    prepare: Artifact
    parent: Artifact
    held_BT: Tensor
    """Held-out sequences."""

    def loss(self, model: PreTrainedModel) -> float:
        """Return the held-out loss in nats per byte."""
        with torch.no_grad():
            return float(_loss(model.eval(), self.held_BT))


def text() -> bytes:
    """Return 1 MiB of source code of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[: 1 << 20]


def sequences(source: bytes) -> Tensor:
    """Cut text into sequences [N, LENGTH] that start with the document token."""
    tokens = torch.tensor(list(source))[: len(source) // LENGTH * LENGTH].view(-1, LENGTH).clone()
    tokens[:, 0] = IDS["bos_id"]
    return tokens


def publish(folder: Path, stage: str) -> Artifact:
    """Make an artifact of a folder."""
    return artifact.publish(
        folder,
        folder.with_name(f"{folder.name}-published"),
        stage=stage,
        node=stage,
        identity={},
        parents={},
        summary={},
    )


def write_prepare(folder: Path, tokens_NT: Tensor) -> Artifact:
    """Write the train split of a prepare artifact."""
    entries = shards.write(
        [tokens_NT.numpy()], folder, "train", sequence_length=LENGTH, dtype="uint16", shard_bytes=LENGTH * 2 * 1000
    )
    split = {"shards": entries, "sequences": len(tokens_NT)}
    index = {"format": 1, "sequence_length": LENGTH, "vocab_size": VOCABULARY, "dtype": "uint16"} | IDS
    (folder / "index.json").write_text(json.dumps(index | {"splits": {"train": split}}))
    return publish(folder, "prepare")


def architecture(**sizes: Any) -> ArchitectureConfig:
    """Return a byte-level architecture."""
    return ArchitectureConfig(vocab_size=VOCABULARY, max_positions=LENGTH, **IDS, **sizes)


def write_model(folder: Path, model: PreTrainedModel) -> Artifact:
    """Write a model as a pretrain artifact."""
    model.save_pretrained(folder / "model")
    (folder / "model" / "tokenizer.json").write_text("{}")
    return publish(folder, "pretrain")


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The trained parent, its train split, and its held-out text."""
    root = tmp_path_factory.mktemp("bench")
    source = text()
    blocks = [source[start : start + 4096] for start in range(0, len(source), 4096)]
    train = sequences(b"".join(block for n, block in enumerate(blocks) if n % 20))
    held = sequences(b"".join(block for n, block in enumerate(blocks) if n % 20 == 0))
    model = build(architecture(width=128, layers=3, heads=4, ffn_width=344, init_std=0.06), seed=0)
    _train(model, train)
    return Bench(write_prepare(root / "prepare", train), write_model(root / "parent", model), held[:200])


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bench]:
    """Return a factory of untrained models of either family, for questions of layout."""
    made: dict[str, Bench] = {}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (24, LENGTH), generator=generator)

    def make(**sizes: Any) -> Bench:
        key = json.dumps(sizes, sort_keys=True)
        if key not in made:
            root = tmp_path_factory.mktemp("small")
            shape = {"width": 32, "layers": 2, "heads": 2, "ffn_width": 88, "init_std": 0.1} | sizes
            parent = write_model(root / "parent", build(architecture(**shape), seed=1))
            made[key] = Bench(write_prepare(root / "prepare", tokens), parent, tokens[:4])
        return made[key]

    return make


Compress = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def compress(tmp_path: Path) -> Compress:
    """Return a function that runs the stage: (child folder, compression.json)."""

    def go(bench: Bench, table: Mapping[str, Any], *, parent: Artifact | None = None) -> tuple[Path, dict[str, Any]]:
        config = CompressConfig.model_validate(table)
        out = tmp_path / f"child-{len(list(tmp_path.glob('child-*')))}"
        out.mkdir()
        context = StageContext(node="compress.child", scratch=tmp_path, compute={"device": "cpu"})
        run(config, {"prepare": bench.prepare, "model": parent or bench.parent}, out, context)
        return out, json.loads((out / "compression.json").read_text())

    return go


def _loss(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    logits = model(input_ids=tokens_BT).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), tokens_BT[:, 1:].reshape(-1))


def _train(model: PreTrainedModel, train_NT: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    order = np.random.default_rng(0).integers(0, len(train_NT), (STEPS, 12))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20, 1.3 * (STEPS - step) / STEPS)
        loss = _loss(model, train_NT[torch.from_numpy(order[step])])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
