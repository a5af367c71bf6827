"""A small real world for evaluation: Python's own help texts, prepared, and models that learned a little of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.stage import StageContext
from pipelines.evaluation.config import EvaluateConfig

LENGTH = 64
VOCABULARY = 512
SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on two threads, and two cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A prepare artifact: 12 held-out help texts, the others packed for training."""
    build = tmp_path_factory.mktemp("prepare") / "build"
    texts = [topics[name].strip() for name in sorted(topics) if len(topics[name]) < 12_000]
    records = [
        {"id": f"topic-{i}", "text": t, "source": f"half-{i % 2}", "license": "PSF-2.0", "work": f"topic-{i}"}
        for i, t in enumerate(texts)
    ]
    test, train = records[::6], [record for i, record in enumerate(records) if i % 6]
    tokenizer = _tokenizer(build / "tokenizer", [record["text"] for record in train])
    (build / "documents").mkdir()
    for split, kept in (("test", test), ("train", train)):
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        (build / "documents" / f"{split}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    rows = _pack(tokenizer, [record["text"] for record in train])
    (build / "train").mkdir()
    half = len(rows) // 2
    shards = []
    for number, part in enumerate((rows[:half], rows[half:])):
        np.save(build / "train" / f"shard-{number:05}.npy", part)
        shards.append({"file": f"train/shard-{number:05}.npy", "sequences": len(part)})
    train_facts = {"shards": shards, "sequences": len(rows), "tokens": rows.size, "documents": len(train)}
    index = {"format": 1, "sequence_length": LENGTH, "vocab_size": VOCABULARY, "dtype": "uint16"}
    index |= {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3, "splits": {"train": train_facts}}
    (build / "index.json").write_text(json.dumps(index))
    return _publish(build, "prepare")


def _tokenizer(folder: Path, texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = dict(zip(("bos_token", "eos_token", "pad_token", "mask_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return tokenizer


def _pack(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    ids = [i for text in texts for i in (0, *tokenizer.encode(text).ids, 1)]
    return np.array(ids[: len(ids) // LENGTH * LENGTH], dtype=np.uint16).reshape(-1, LENGTH)


def _publish(build: Path, stage: str) -> Artifact:
    return artifact.publish(
        build, build.parent / stage, stage=stage, node=stage, identity={"stage": stage}, parents={}, summary={}
    )


@pytest.fixture(scope="session")
def save_model(prepared: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Artifact]:
    """Return a function that publishes a model as pretrain does, with the tokenizer of the prepared data."""

    def save(model: Any) -> Artifact:
        build = tmp_path_factory.mktemp("model") / "build"
        model.save_pretrained(build / "model")
        for path in (prepared.path / "tokenizer").iterdir():
            (build / "model" / path.name).write_bytes(path.read_bytes())
        return _publish(build, "pretrain")

    return save


@pytest.fixture(scope="session")
def decoder(prepared: Artifact) -> LlamaForCausalLM:
    """A decoder that has seen the train tokens about twice."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=2 * LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    _train(model, _rows(prepared), lambda ids: {"input_ids": ids, "labels": ids}, steps=150)
    return model.eval()


@pytest.fixture(scope="session")
def encoder(prepared: Artifact) -> ModernBertForMaskedLM:
    """A masked language model that has seen the train tokens several times.

    A narrow attention window and a linear decay to zero: masked prediction leaves the unigram plateau late otherwise.
    """
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=2 * LENGTH, bos_token_id=0, cls_token_id=0, eos_token_id=1, sep_token_id=1,
        pad_token_id=2, attn_implementation="sdpa", local_attention=8,
    )  # fmt: skip
    model = ModernBertForMaskedLM(config)
    generator = torch.Generator().manual_seed(0)

    def hide(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        masked = torch.rand(ids.shape, generator=generator) < 0.15
        return {"input_ids": ids.masked_fill(masked, 3), "labels": ids.masked_fill(~masked, -100)}

    _train(model, _rows(prepared), hide, steps=300, rows_per_step=32)
    return model.eval()


def _rows(prepared: Artifact) -> torch.Tensor:
    shards = [np.load(prepared.path / "train" / f"shard-0000{i}.npy") for i in (0, 1)]
    return torch.from_numpy(np.concatenate(shards).astype(np.int64))


def _train(
    model: Any,
    rows: torch.Tensor,
    inputs: Callable[[torch.Tensor], dict[str, Any]],
    steps: int,
    rows_per_step: int = 16,
) -> None:
    """Run AdamW with 50 steps of warm-up and a linear decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 50) * (1.0 - step / steps)
        batch = rows[torch.randint(len(rows), (rows_per_step,), generator=generator)]
        optimizer.zero_grad()
        model(**inputs(batch)).loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def decoder_artifact(decoder: LlamaForCausalLM, save_model: Callable[[Any], Artifact]) -> Artifact:
    """The decoder as pretrain publishes it."""
    return save_model(decoder)


@pytest.fixture(scope="session")
def encoder_artifact(encoder: ModernBertForMaskedLM, save_model: Callable[[Any], Artifact]) -> Artifact:
    """The encoder as pretrain publishes it."""
    return save_model(encoder)


@pytest.fixture(scope="session")
def small() -> EvaluateConfig:
    """Few items and no latency probe; everything else as in a real run."""
    return EvaluateConfig.model_validate(
        {"tasks": {"items": 24}, "probes": {"latency": {"enabled": False}}, "bootstrap_samples": 500, "kl_tokens": 2000}
    )


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    """A context with a scratch folder of its own, on the CPU."""
    return StageContext(node="evaluate.pretrain", scratch=tmp_path / "scratch", compute=ComputeConfig(device="cpu"))
