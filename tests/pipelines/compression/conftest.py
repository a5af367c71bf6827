"""Small untrained models of either family for questions of layout, and the stage as a function of a table.

The trained model is the fixture `bench` of `tests/conftest.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from pipelines.compression import calibration
from pipelines.compression.calibration import Batch
from pipelines.compression.config import CompressConfig
from pipelines.compression.run import CompressionRun
from pipelines.compression.stage import run
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.stage import StageContext
from pipelines.data import shards
from pipelines.data.packing import Block

LENGTH = 96
IDS = {"bos_id": 256, "eos_id": 257, "pad_id": 258, "mask_id": 259}
VOCABULARY = 260


@dataclass(frozen=True)
class Small:
    """A parent with its data."""

    prepare: Artifact
    parent: Artifact
    held_BT: Tensor
    """Sequences that neither was made from."""


def text_of(prepare: Artifact, tokens_NT: Any) -> list[Batch]:
    """Return packed sequences as a decoder is calibrated on them."""
    labels_NT = calibration.labels(prepare.path, tokens_NT, seed=0, masked=False)
    return calibration.batches(prepare.path, tokens_NT, labels_NT)


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


def write_prepare(
    folder: Path, tokens_NT: Tensor, ids: Mapping[str, int] = IDS, vocabulary: int = VOCABULARY
) -> Artifact:
    """Write the train split of a prepare artifact."""
    length = tokens_NT.shape[1]
    entries = shards.write(
        [Block.of_rows(tokens_NT.numpy())],
        folder,
        "train",
        sequence_length=length,
        dtype="uint16",
        shard_bytes=length * 2 * 1000,
    )
    split = {"shards": entries, "sequences": len(tokens_NT)}
    index = {"format": 1, "sequence_length": length, "vocab_size": vocabulary, "dtype": "uint16"} | dict(ids)
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
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Small]:
    """Return a factory of untrained models of either family, for questions of layout."""
    made: dict[str, Small] = {}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (24, LENGTH), generator=generator)

    def make(**sizes: Any) -> Small:
        key = json.dumps(sizes, sort_keys=True)
        if key not in made:
            root = tmp_path_factory.mktemp("small")
            shape = {"width": 32, "layers": 2, "heads": 2, "ffn_width": 88, "init_std": 0.1} | sizes
            parent = write_model(root / "parent", build(architecture(**shape), seed=1))
            made[key] = Small(write_prepare(root / "prepare", tokens), parent, tokens[:4])
        return made[key]

    return make


Compress = Callable[..., tuple[Path, dict[str, Any]]]
Opened = Callable[..., CompressionRun]


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Return a function that opens a base model as the stage does: (bench, table) to a `CompressionRun`."""

    def go(bench: Any, table: Mapping[str, Any], *, parent: Artifact | None = None) -> CompressionRun:
        config = CompressConfig.model_validate({"baseline_documents": 0} | dict(table))
        folder = tmp_path_factory.mktemp("opened")
        context = StageContext(node="compress.x", scratch=folder, compute=ComputeConfig(device="cpu"))
        inputs = {"prepare": bench.prepare, "model": parent or bench.parent}
        return CompressionRun.open(config, inputs, folder, context, run)

    return go


@pytest.fixture
def compress(tmp_path: Path) -> Compress:
    """Return a function that runs the stage: (variant folder, compression.json); compared only on request."""

    def go(bench: Any, table: Mapping[str, Any], *, parent: Artifact | None = None) -> tuple[Path, dict[str, Any]]:
        config = CompressConfig.model_validate({"baseline_documents": 0} | dict(table))
        out = tmp_path / f"child-{len(list(tmp_path.glob('child-*')))}"
        out.mkdir()
        context = StageContext(node="compress.child", scratch=tmp_path, compute=ComputeConfig(device="cpu"))
        run(config, {"prepare": bench.prepare, "model": parent or bench.parent}, out, context)
        return out, json.loads((out / "compression.json").read_text())

    return go
