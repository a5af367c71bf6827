"""What tests of deployment share: model folders with a real tokenizer, and llama.cpp as the reader of GGUF files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from pipelines.compression.config import CompressConfig
from pipelines.compression.stage import run
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.stage import StageContext
from pipelines.data import shards, tokenizer
from pipelines.data.config import TokenizerTraining
from pipelines.data.packing import Block

LENGTH = 64
WORDS = "the ark of gopher wood shall thou make; 1611 AD, rooms shalt thou make in it -- caf\u00e9 \u00bd\n\n"


class LlamaCpp:
    """llama.cpp on one file: an implementation that shares no code with ours.

    Args:
        path: GGUF file.
    """

    def __init__(self, path: Path) -> None:
        from cyllama.llama import llama_cpp

        self._library = llama_cpp
        options = llama_cpp.LlamaModelParams()
        options.use_mmap = False
        # cyllama 0.2.18 asks the model for a size that only its vocabulary has, so the model is given one.
        self.model = type("Model", (llama_cpp.LlamaModel,), {})(str(path), options, verbose=False)
        self.vocabulary = self.model.get_vocab()
        self.model.n_vocab = self.vocabulary.n_vocab

    def tokens(self, text: str, *, add_special: bool = False) -> list[int]:
        """Return the ids of a text."""
        return list(self.vocabulary.tokenize(text, add_special, False))

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Return the logits at every position, float32 [T, vocabulary]."""
        options = self._library.LlamaContextParams()
        options.n_ctx, options.n_threads, options.n_threads_batch = 128, 1, 1
        # Keys and values are cached as float32, else the cache would round more than the weights do.
        options.flash_attn_type, options.type_k, options.type_v = 0, 0, 0
        context = self._library.LlamaContext(self.model, options, verbose=False)
        batch = self._library.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for position, token in enumerate(tokens):
            batch.add(token, position, [0], True)
        assert context.decode(batch) == 0
        rows = [context.get_logits_ith(position) for position in range(len(tokens))]
        context.close()
        return np.array(rows, np.float32)


@pytest.fixture(scope="session")
def llama_cpp() -> type[LlamaCpp]:
    """Return the reader of GGUF files."""
    return LlamaCpp


@pytest.fixture(scope="session")
def model_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """Return a factory of untrained models of either family with a trained tokenizer, as artifacts."""
    trained = tokenizer.train([WORDS * 3, WORDS.upper() * 3], 300, TokenizerTraining())

    def make(**sizes: Any) -> Artifact:
        root = tmp_path_factory.mktemp("model")
        ids = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
        shape = {
            "vocab_size": trained.vocab_size,
            "width": 64,
            "layers": 2,
            "heads": 4,
            "ffn_width": 96,
            "init_std": 0.15,
        } | sizes
        config = ArchitectureConfig(max_positions=LENGTH, **ids, **shape)
        build(config, seed=3).save_pretrained(root / "build" / "model")
        trained.save(root / "build" / "model", LENGTH)
        names = {"stage": "pretrain", "node": "pretrain", "identity": {}, "parents": {}, "summary": {}}
        return artifact.publish(root / "build", root / "final", **names)

    return make


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A prepare artifact of random tokens, for methods that calibrate."""
    root = tmp_path_factory.mktemp("noise")
    build = root / "build"
    tokens = np.random.default_rng(0).integers(4, 260, (8, 32))
    entries = shards.write(
        [Block.of_rows(tokens)], build, "train", sequence_length=32, dtype="uint16", shard_bytes=10_000
    )
    split = {"train": {"shards": entries, "sequences": len(tokens)}}
    index = {"format": 1, "sequence_length": 32, "vocab_size": 300, "dtype": "uint16", "splits": split}
    index |= {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    (build / "index.json").write_text(json.dumps(index))
    names = {"stage": "prepare", "node": "prepare", "identity": {}, "parents": {}, "summary": {}}
    return artifact.publish(build, root / "final", **names)


@pytest.fixture(scope="session")
def variant(noise: Artifact) -> Callable[[Artifact, Path, dict[str, Any]], Artifact]:
    """Return a function that compresses a model into a folder of its own."""

    def make(parent: Artifact, folder: Path, table: dict[str, Any]) -> Artifact:
        (folder / "build").mkdir(parents=True)
        context = StageContext(node="compress.variant", scratch=folder, compute=ComputeConfig(device="cpu"))
        config = CompressConfig.model_validate({"baseline_documents": 0, "samples": 8} | table)
        run(config, {"prepare": noise, "model": parent}, folder / "build", context)
        names = {"stage": "compress", "node": "compress.variant", "identity": {}, "parents": {}, "summary": {}}
        return artifact.publish(folder / "build", folder / "final", **names)

    return make


@pytest.fixture(scope="session")
def transformers_logits() -> Callable[[Path, list[int]], NDArray[np.float32]]:
    """Return a function of model folder and ids: the logits [T, vocabulary] of our own loader."""
    from pipelines.modelio.load import load_model

    def logits(folder: Path, tokens: list[int]) -> NDArray[np.float32]:
        with torch.no_grad():
            found: NDArray[np.float32] = load_model(folder)(input_ids=torch.tensor([tokens])).logits[0].float().numpy()
        return found

    return logits
