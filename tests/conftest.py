"""What tests share: a tiny prepared corpus, pretraining runs on it, disks that fill up, the bench of compression."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from tests import s3_server
from tests.s3_server import S3Server

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

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


@pytest.fixture(autouse=True)
def _signals_are_given_back() -> Iterator[None]:
    """Refuse a test that keeps this process's signals: a later test that signals itself would end the whole run."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(signum) for signum in signals]
    yield
    assert [signal.getsignal(signum) for signum in signals] == before, "run what takes over signals in its own process"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A prepare artifact of 61 tokens: each is a function of the one before it, or, one time in four, random."""
    from pipelines.data import shards
    from pipelines.data.packing import Block

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
        entries = shards.write(
            [Block.of_rows(tokens)], build, split, sequence_length=LENGTH, dtype="uint16", shard_bytes=1000
        )
        size = {"sequences": sequences, "tokens": sequences * LENGTH, "documents": sequences, "bytes": tokens.size * 3}
        splits[split] = {"shards": entries, **size}
        if split == "validation":
            _write_documents(build / "documents" / f"{split}.jsonl.zst", tokens)
    _write_tokenizer(build / "tokenizer")
    ids = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    index = {"format": 1, "sequence_length": LENGTH, "vocab_size": VOCABULARY, "dtype": "uint16", **ids}
    (build / "index.json").write_text(json.dumps({**index, "splits": splits}))
    return artifact.publish(
        build, root / "final", stage="prepare", node="prepare", identity={"tiny": True}, parents={}, summary={}
    )


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with the bucket `corpus`; it asks for its secret."""
    with s3_server.serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_store(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of an empty store on S3, and the environment of a machine that has never seen it."""
    for name, value in {**s3.environment, "INGOT_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.BUCKET}/{tmp_path.name}-{os.getpid()}"


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, Any]:
    """Return pretrain settings for a 2-rank run of six steps on `prepared`."""
    return TINY


@pytest.fixture
def plain_spec(prepared: Artifact) -> Callable[..., Any]:
    """Return the order for a run in this process: `plain_spec(folder, **changes of the settings)`."""
    from pipelines.training.config import PretrainConfig
    from pipelines.training.worker_spec import WorkerSpec

    def make(folder: Path, **changes: Any) -> WorkerSpec:
        config = PretrainConfig.model_validate({**TINY, **changes, **PLAIN})
        folder.mkdir(parents=True, exist_ok=True)
        index = prepared.read_json("index.json")
        return WorkerSpec(config=config, index=index, data=prepared.path, scratch=folder, device="cpu")

    return make


@pytest.fixture
def run_plain(plain_spec: Callable[..., Any]) -> Iterator[Callable[..., int]]:
    """Run one plain pretraining in this process and return its exit code; process-wide settings are put back."""
    import torch

    from pipelines.training import worker

    threads, handlers = torch.get_num_threads(), {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def run(folder: Path, **changes: Any) -> int:
        spec = plain_spec(folder, **changes)
        (folder / "worker_spec.json").write_text(spec.model_dump_json())
        return worker.main([str(folder / "worker_spec.json")])

    yield run
    torch.use_deterministic_algorithms(mode=False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@dataclass(frozen=True)
class Disk:
    """A real file system of its own, in memory."""

    path: Path

    def resize(self, kib: int) -> None:
        """Give it another size."""
        subprocess.run(["mount", "-o", f"remount,size={kib}k", str(self.path)], check=True)


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[int], Disk]]:
    """Return a function that makes a disk of so many KiB."""
    made: list[Path] = []

    def make(kib: int) -> Disk:
        path = tmp_path / f"disk{len(made)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(path)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted here")
        made.append(path)
        return Disk(path)

    yield make
    for path in made:
        subprocess.run(["umount", "-l", str(path)], check=True)


@dataclass(frozen=True)
class Bench:
    """Bench C of the compression tests: a byte-level decoder that our own pipeline trained, with its data.

    `flows/recipes/bench.toml`: 3 layers of width 128, 0.7 M parameters, 1100 steps of 12 x 96 bytes of the bundled
    corpus, whose test documents are held out by work. Weights are never committed: what DVC tracks is the corpus, and
    the model is rebuilt from it, two minutes on one core, once per machine (see `bench`).
    """

    prepare: Artifact
    parent: Artifact
    held_BT: Tensor
    """Held-out sequences [192, 96] of the test split, evenly spaced."""

    def loss(self, model: PreTrainedModel) -> float:
        """Return the held-out loss in nats per byte: no start of a document and no padding is asked for, or asked."""
        import torch

        with torch.no_grad():
            logits_BTV = model.eval()(input_ids=self.held_BT).logits[:, :-1]
        pad, targets_BT = model.config.pad_token_id, self.held_BT[:, 1:]
        text_BT = (targets_BT != model.config.bos_token_id) & (targets_BT != pad) & (self.held_BT[:, :-1] != pad)
        return float(torch.nn.functional.cross_entropy(logits_BTV[text_BT], targets_BT[text_BT]))


@pytest.fixture(scope="session")
def bench() -> Bench:
    """The trained parent, its prepared data and its held-out text."""
    return build_bench()


def build_bench() -> Bench:
    """Return the bench, built or from the cache.

    Cached in the store `$INGOT_BENCH`, by default `~/.cache/ingot-bench`, by identity: another recipe, corpus or stage
    version is another model. What the cache holds is verified on every use; concurrent sessions wait for one.
    """
    import torch

    from flows import recipe
    from flows.graph import identify
    from pipelines.core.compute import ComputeConfig
    from pipelines.core.program import ROOT as CHECKOUT
    from pipelines.core.run_stage import materialize
    from pipelines.core.stage import StageContext
    from pipelines.core.store import LocalStore
    from pipelines.data import shards, versioning

    config = recipe.resolve("bench")
    versioning.ensure(config.data, CHECKOUT)
    data_hash = versioning.data_hash(config.data, CHECKOUT)
    store = LocalStore(Path(os.environ.get("INGOT_BENCH", Path.home() / ".cache" / "ingot-bench")))
    made: dict[str, Artifact] = {}
    for name, node in identify(config, data_hash).items():
        if name in {"prepare", "pretrain"}:
            context = StageContext(node=name, scratch=store.root, compute=ComputeConfig(device="cpu"))
            inputs = {key: made[source] for key, source in node.node.inputs.items()}
            stage = node.node.stage, node.node.config, inputs, store, context
            made[name] = _kept(store.artifacts(), node.identity, inputs) or materialize(
                *stage, input_keys=node.input_keys, data_hash=data_hash
            )
            made[name].verify()
    reader = shards.ShardReader(made["prepare"].path, "test")
    held_BT = torch.from_numpy(reader.take(np.linspace(0, len(reader) - 1, 192).astype(int)))
    return Bench(made["prepare"], made["pretrain"], held_BT)


def _kept(found: Iterator[Artifact], wanted: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> Artifact | None:
    """Return an artifact of the same stage version, inputs and settings, those apart that did not exist yet.

    A setting that came later has a default that changed nothing, or the stage's version would have been raised.
    """
    from pipelines.core import fingerprint

    for each in found:
        old = each.manifest.identity
        later = all("(absent) ->" in str(change) for change in fingerprint.explain(old["config"], wanted["config"]))
        parents = {key: used.digest for key, used in inputs.items()}
        same_inputs = each.manifest.parents == parents and (parents or old["inputs"] == wanted["inputs"])
        if later and same_inputs and all(old[key] == wanted[key] for key in ("stage", "version")):
            return each
    return None


def _write_documents(path: Path, tokens_NT: Any) -> None:
    """Write every sequence as a document of its words, without the special tokens."""
    import zstandard

    path.parent.mkdir()
    texts = [" ".join(f"w{token}" for token in row if token >= 4) for row in tokens_NT.tolist()]
    lines = [json.dumps({"id": f"d{n}", "text": text, "source": "made"}) + "\n" for n, text in enumerate(texts)]
    path.write_bytes(zstandard.compress("".join(lines).encode()))


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>"]
    words = {word: number for number, word in enumerate([*special, *(f"w{n}" for n in range(4, VOCABULARY))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w4"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("bos_token", "eos_token", "pad_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
