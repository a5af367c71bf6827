"""A small world for the promote stage: a prepared corpus, models that load, and evaluations with chosen numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from pipelines.core import artifact, provenance
from pipelines.core.artifact import Artifact
from pipelines.core.stage import StageContext, Summary, TrackingTarget
from pipelines.registry import stage
from pipelines.registry.config import PromoteConfig

DATA_HASH = "0123456789abcdef0123456789abcdef.dir"
DOCUMENTS = 40
SETTINGS = {"context": 64, "stride": 48, "documents": "d" * 64, "batch_tokens": 512, "max_documents": None}
WORKER = Path(__file__).parent / "promote_once.py"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, as the pretrain stage leaves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the king and the queen"], trainer)
    names = {"bos_token": special[0], "eos_token": special[1], "pad_token": special[2], "mask_token": special[3]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size = tokenizer.get_vocab_size()
    LlamaForCausalLM(LlamaConfig(vocab_size=size, bos_token_id=0, eos_token_id=1, **shape)).save_pretrained(folder)
    return folder


class World:
    """Publishes artifacts with chosen numbers and promotes among them.

    Args:
        root: the store.
        model_folder: a model that loads.
        uri: MLflow; by default a database in the store.
    """

    def __init__(self, root: Path, model_folder: Path, uri: str | None = None) -> None:
        self.root = root
        self.tracking = TrackingTarget(uri=uri)
        self.model_folder = model_folder
        self.sizes = np.random.default_rng(1).integers(60, 600, DOCUMENTS)
        self.difficulty = np.random.default_rng(2).uniform(0.8, 1.2, DOCUMENTS)
        self._built = 0
        self.prepare = self.prepared()

    def prepared(self, text: str = "the king and the queen") -> Artifact:
        """Publish a corpus whose held-out text is `text`."""
        build = self._build()
        for split in ("train", "validation", "test"):
            names = {"source": "shakespeare", "license": "public domain", "work": "hamlet"}
            texts = [(f"{text} " * size)[:size] for size in self.sizes]
            rows = [{"id": f"{split}-{number}", "text": each, **names} for number, each in enumerate(texts)]
            path = build / "documents" / f"{split}.jsonl.zst"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        (build / "tokenizer").mkdir()
        shutil.copyfile(self.model_folder / "tokenizer.json", build / "tokenizer" / "tokenizer.json")
        counts = {"sources": {"shakespeare": {"read": 50, "kept": 45, "dropped": {"near duplicate": 5}}}}
        counts["sources"]["shakespeare"]["licenses"] = ["public domain"]
        (build / "report.json").write_text(json.dumps(counts))
        splits = {"train": {"documents": 40, "tokens": 9000}, "test": {"documents": 5, "tokens": 900}}
        ids = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
        (build / "index.json").write_text(json.dumps({"splits": splits, "sequence_length": 64, **ids}))
        return self._publish(build, "prepare", "prepare", {"text": text}, {}, {"train_tokens": 9000})

    def model(
        self,
        name: str,
        *,
        base: Artifact | None = None,
        seed: int = 0,
        prepare: Artifact | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Artifact:
        """Publish a model, with more files in its folder if wanted; with a base it is a compressed variant."""
        build = self._build()
        shutil.copytree(self.model_folder, build / "model")
        for file, content in (files or {}).items():
            (build / "model" / file).write_bytes(content)
        (build / "note.txt").write_text(f"{name} {seed}")
        parents = {"prepare": (prepare or self.prepare).digest}
        if base is not None:
            parents["model"] = base.digest
            totals = {"layers": 1, "bytes": 10, "base_bytes": 40, "ratio": 4.0, "bits_per_weight": 8.5}
            totals |= {"model_bits_per_weight": 11.1}
            facts = {"format": 1, "method": "rtn", "parameters": {}, "layout": "compressed-tensors", "layers": {}}
            facts |= {"loads_with": "transformers", "totals": totals}
            (build / "compression.json").write_text(json.dumps(facts))
        kind = "pretrain" if base is None else "compress"
        node = "pretrain" if base is None else f"compress.{name}"
        return self._publish(build, kind, node, {"name": name, "seed": seed}, parents, {"steps": 600})

    def evaluation(
        self,
        model: Artifact,
        bits: float,
        *,
        size: int = 1000,
        noise: float = 0.0,
        accuracy: float | None = 0.75,
        prepare: Artifact | None = None,
        family: str = "decoder",
        nats: Any = None,
        documents: int = DOCUMENTS,
        extra: Mapping[str, Any] | None = None,
        samples: list[dict[str, Any]] | None = None,
    ) -> Artifact:
        """Publish an evaluation with these bits per byte; `noise` scatters the documents independently."""
        prepare = prepare or self.prepare
        sizes = self.sizes[:documents]
        if nats is None:
            scatter = np.random.default_rng(int(bits * 1e6) % 2**31).normal(1.0, noise, DOCUMENTS)
            nats = bits * np.log(2.0) * sizes * (self.difficulty * scatter)[:documents]
        value = float(np.sum(nats) / (sizes.sum() * np.log(2.0)))
        items = 64
        tasks: dict[str, Any] = {}
        outcomes: dict[str, list[int]] = {}
        if accuracy is not None:
            right = round(accuracy * items)
            outcomes = {"cloze": [1] * right + [0] * (items - right)}
            stderr = (accuracy * (1 - accuracy) / items) ** 0.5
            tasks = {"cloze": {"accuracy": accuracy, "stderr": stderr, "n": items, "chance": 0.25, "hash": "x"}}
        measured = {
            "bits_per_byte": {"value": value, "low": value - 0.01, "high": value + 0.01},
            "tasks": tasks,
            "size_bytes": size,
            "family": family,
            "settings": {
                "context": 64,
                "stride": 48,
                "documents": "d" * 64,
                "batch_tokens": 512,
                "max_documents": None,
            },
            "truncated": False,
            "documents": DOCUMENTS,
            "baselines": {"gzip": 3.24, "order1": 3.15} if "model" not in model.manifest.parents else {},
            "versus_base": {"kl_nats_per_token": 0.01} if "model" in model.manifest.parents else None,
            **(extra or {}),
        }
        build = self._build()
        if samples is not None:
            (build / "samples.json").write_text(json.dumps(samples))
        (build / "evaluation.json").write_text(json.dumps(measured))
        (build / "task_outcomes.json").write_text(json.dumps(outcomes))
        (build / "observations.json").write_text(json.dumps({"latency": {"decode_ms_per_token": size / 100}}))
        np.save(build / "document_nats.npy", np.asarray(nats, dtype=np.float64), allow_pickle=False)
        np.save(build / "document_bytes.npy", sizes, allow_pickle=False)
        parents = {"prepare": prepare.digest, "model": model.digest}
        node = "evaluate." + model.manifest.node.removeprefix("compress.")
        identity = {
            "of": model.digest,
            "bits": repr(bits),
            "size": size,
            "extra": dict(extra or {}),
            "samples": samples,
        }
        return self._publish(build, "evaluate", node, identity, parents, {"bits_per_byte": value})

    def inputs(self, *models: tuple[Artifact, Artifact], prepare: Artifact | None = None) -> dict[str, Artifact]:
        """Return the inputs of the promote stage for (model, evaluation) pairs."""
        found = {"prepare": prepare or self.prepare}
        for model, evaluation in models:
            name = model.manifest.node.removeprefix("compress.")
            found |= {f"model:{name}": model, f"evaluation:{name}": evaluation}
        return found

    def start_promotion(
        self, name: str, inputs: Mapping[str, Artifact], fault: str | None = None
    ) -> subprocess.Popen[str]:
        """Start a promotion in a process of its own; `fault` is the point where it kills itself."""
        folder = self.root.parent / name
        folder.mkdir(parents=True)
        paths = {name: str(artifact.path) for name, artifact in inputs.items()}
        job = {"store": str(self.root), "out": str(folder), "inputs": paths, "tracking": self.tracking.model_dump()}
        (folder / "job.json").write_text(json.dumps(job))
        environment = dict(os.environ)
        if fault is not None:
            (folder / "faults.json").write_text(json.dumps([{"point": fault, "action": "SIGKILL"}]))
            environment["INGOT_FAULTS"] = str(folder / "faults.json")
        command = [sys.executable, str(WORKER), str(folder / "job.json")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def candidate(self, bits: float, *, seed: int = 0, **options: Any) -> dict[str, Artifact]:
        """Return inputs with one pretrained model of these bits per byte."""
        model = self.model("pretrain", seed=seed)
        return self.inputs((model, self.evaluation(model, bits, **options)))

    def promote(self, inputs: Mapping[str, Artifact], out: Path | None = None, **config: Any) -> Summary:
        """Run the promote stage as the flow does."""
        out = out or self._build()
        scratch = self.root / "scratch" / "promote"
        scratch.mkdir(parents=True, exist_ok=True)
        context = StageContext(node="promote", scratch=scratch, tracking=self.tracking, store=self.root)
        return stage.run(PromoteConfig(**config), inputs, out, context)

    def client(self) -> Any:
        """Return a second connection to MLflow."""
        from mlflow import MlflowClient

        return MlflowClient(self.tracking.uri or f"sqlite:///{self.root}/mlflow.db")

    def _build(self) -> Path:
        self._built += 1
        folder = self.root / "building" / str(self._built)
        folder.mkdir(parents=True)
        return folder

    def _publish(
        self, build: Path, kind: str, node: str, identity: dict[str, Any], parents: dict[str, str], summary: Summary
    ) -> Artifact:
        return artifact.publish(
            build,
            self.root / "artifacts" / kind / build.name,
            stage=kind,
            node=node,
            identity=identity | {"parents": parents},
            parents=parents,
            summary=summary,
            provenance=provenance.capture(duration_s=1.0, source_digest="0" * 64, data_hash=DATA_HASH),
            observations=("observations.json",),
        )


@pytest.fixture
def world_at(model_folder: Path) -> Callable[[Path, str], World]:
    """Return a function of a store and an MLflow that makes a world."""
    return lambda root, uri: World(root, model_folder, uri)


_WATCHERS: list[list[str]] = []


@pytest.fixture
def opened_files() -> Iterator[list[str]]:
    """Return the names of the files that this process opens from now on, in order."""
    if not _WATCHERS:  # an audit hook stays for good, so there is one for all tests
        sys.addaudithook(lambda event, facts: event == "open" and _WATCHERS and _WATCHERS[-1].append(str(facts[0])))
    _WATCHERS.append([])
    yield _WATCHERS[-1]
    _WATCHERS[-1] = []


@pytest.fixture
def world(store_root: Path, model_folder: Path) -> World:
    """A store with a prepared corpus."""
    return World(store_root, model_folder)


@pytest.fixture
def world_of(store_root: Path) -> Callable[[Path], World]:
    """Return a function that makes the store for a model of one's own."""
    return lambda model: World(store_root, model)


@pytest.fixture
def second_world(world: World, model_folder: Path, tmp_path: Path) -> World:
    """Another store, whose models are registered in the same MLflow."""
    return World(tmp_path / "second", model_folder, f"sqlite:///{world.root}/mlflow.db")
