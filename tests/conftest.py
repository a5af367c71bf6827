"""What tests of training share: a tiny prepared corpus, and pretraining runs on it in this process."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import artifact
from pipelines.artifact import Artifact

VOCABULARY, LENGTH = 61, 24
TINY: dict[str, Any] = {
    "preset": "0.5m",
    "model": {"width": 32, "layers": 3, "heads": 2, "ffn_width": 44},
    "steps": 6,
    "batch_size": 8,
    "micro_batch_size": 2,
    "validate_every": 3,
    "validation_sequences": 5,
    "schedule": {"warmup": 2},
    "optimizer": {"clip": 0.5},
    "checkpoint": {"every": 2},
}
PLAIN = {"engine": "plain", "world_size": 1, "zero_stage": 0}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="record tests/golden/losses.json anew")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A prepare artifact of 61 tokens: each is a function of the one before it, or, one time in four, random."""
    from pipelines.data import shards

    root = tmp_path_factory.mktemp("prepared")
    build = root / "build"
    splits: dict[str, Any] = {}
    for number, (split, sequences) in enumerate((("train", 90), ("validation", 7), ("test", 5))):
        rng = np.random.Generator(np.random.Philox(number))
        tokens = rng.integers(4, VOCABULARY, (sequences, LENGTH))
        for column in range(1, LENGTH):
            follow = rng.random(sequences) < 0.75
            tokens[follow, column] = 4 + (tokens[follow, column - 1] * 7 + 3) % (VOCABULARY - 4)
        tokens[:, 0] = 0
        tokens[::5, -3:] = 2
        entries = shards.write([tokens], build, split, sequence_length=LENGTH, dtype="uint16", shard_bytes=1000)
        size = {"sequences": sequences, "tokens": sequences * LENGTH, "documents": sequences, "bytes": tokens.size * 3}
        splits[split] = {"shards": entries, **size}
    _write_tokenizer(build / "tokenizer")
    ids = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    index = {"format": 1, "sequence_length": LENGTH, "vocab_size": VOCABULARY, "dtype": "uint16", **ids}
    (build / "index.json").write_text(json.dumps({**index, "splits": splits}))
    return artifact.publish(
        build, root / "final", stage="prepare", node="prepare", identity={"tiny": True}, parents={}, summary={}
    )


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, Any]:
    """Return pretrain settings for a 2-rank run of six steps on `prepared`."""
    return TINY


@pytest.fixture
def plain_job(prepared: Artifact) -> Callable[..., Any]:
    """Return the order for a run in this process: `plain_job(folder, **changes of the settings)`."""
    from pipelines.training.config import PretrainConfig
    from pipelines.training.job import Job

    def make(folder: Path, **changes: Any) -> Job:
        config = PretrainConfig.model_validate({**TINY, **changes, **PLAIN})
        folder.mkdir(parents=True, exist_ok=True)
        index = prepared.read_json("index.json")
        return Job(config=config, index=index, data=prepared.path, work=folder, device="cpu", threads=1)

    return make


@pytest.fixture
def run_plain(plain_job: Callable[..., Any]) -> Iterator[Callable[..., int]]:
    """Run one plain pretraining in this process and return its exit code; process-wide settings are put back."""
    import torch

    from pipelines.training import worker

    threads, handlers = torch.get_num_threads(), {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def run(folder: Path, **changes: Any) -> int:
        job = plain_job(folder, **changes)
        (folder / "job.json").write_text(job.model_dump_json())
        return worker.main([str(folder / "job.json")])

    yield run
    torch.use_deterministic_algorithms(mode=False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>"]
    words = {word: number for number, word in enumerate([*special, *(f"w{n}" for n in range(4, VOCABULARY))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w4"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("bos_token", "eos_token", "pad_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
