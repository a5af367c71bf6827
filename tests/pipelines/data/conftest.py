"""Fixtures of the data tests: small corpora made of real words, and prepared artifacts."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.core.program import ROOT as CHECKOUT
from pipelines.core.stage import StageContext
from pipelines.data import stage, versioning
from pipelines.data.config import PrepareConfig, PrepareJob

Records = Sequence[dict[str, Any]]


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The bundled corpus in the work tree, pulled when it is not there."""
    config = PrepareJob().data
    versioning.ensure(config, CHECKOUT)
    return versioning.verify(config, CHECKOUT).path


@pytest.fixture(scope="session")
def vocabulary(corpus: Path) -> list[str]:
    """Ten thousand different words of the bundled corpus."""
    from pipelines.data import reader
    from pipelines.data.records import Document

    words: dict[str, None] = {}
    for record in reader.read(corpus / "shakespeare.jsonl.zst"):
        assert isinstance(record, Document)
        words.update(dict.fromkeys(record.text.split()))
        if len(words) > 10_000:
            break
    return list(words)[:10_000]


@pytest.fixture(scope="session")
def make_documents(vocabulary: list[str]) -> Callable[..., list[dict[str, Any]]]:
    """Return a maker of unrelated documents of random words: (count, words each, seed) -> records."""

    def make(count: int, words: int = 120, seed: int = 0) -> list[dict[str, Any]]:
        rng = random.Random(seed)
        return [
            {
                "id": f"d{seed}-{number}",
                "text": " ".join(rng.choices(vocabulary, k=words)),
                "source": f"source-{number % 3}",
                "license": "Public-Domain",
            }
            for number in range(count)
        ]

    return make


@pytest.fixture(scope="session")
def write_shard() -> Callable[[Path, Records], Path]:
    """Return a writer of plain JSON Lines."""

    def write(path: Path, records: Records) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Path]:
    """Return a runner of the stage's body: (corpus folder, a tokenizer, **prepare settings) -> folder of the result."""
    runs = iter(range(1000))

    def run(data: Path, known: Path | None = None, **settings: Any) -> Path:
        number = next(runs)
        small = {"vocab_size": 300, "sequence_length": 16, "workers": 1, "min_held_out_documents": 1}
        config = PrepareConfig(**{**small, **settings})
        found = versioning.hash_files(data)
        out = tmp_path / f"out-{number}"
        out.mkdir()
        context = StageContext("prepare", tmp_path / f"scratch-{number}")
        stage.prepare(versioning.Corpus(data, versioning.hash_tree(found), found), config, out, context, known)
        return out

    return run


@pytest.fixture(scope="session")
def bundled(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled corpus prepared with the default settings."""
    out = tmp_path_factory.mktemp("bundled")
    scratch = tmp_path_factory.mktemp("scratch")
    stage.run(PrepareJob(), {}, out, StageContext("prepare", scratch))
    return out


@pytest.fixture(scope="session")
def dvc_command() -> Callable[..., str]:
    """Return a runner of the real DVC and git: (folder, program, *arguments) -> output."""

    def run(folder: Path, program: str, *arguments: str) -> str:
        command = [sys.executable, "-m", "dvc"] if program == "dvc" else [program]
        done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def commit(dvc_command: Callable[..., str]) -> Callable[[Path, str], None]:
    """Return a function that commits everything in a folder, which becomes a git repository if it is none."""

    def run(folder: Path, message: str) -> None:
        if not (folder / ".git").exists():
            dvc_command(folder, "git", "init", "--quiet")
        dvc_command(folder, "git", "add", "--all")
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        dvc_command(folder, "git", *identity, "commit", "--quiet", "-m", message)

    return run


@pytest.fixture
def clone(tmp_path: Path, dvc_command: Callable[..., str], commit: Callable[[Path, str], None]) -> Path:
    """What a fresh clone of this checkout has of the corpus: data.dvc and DVC's files, in a git repository."""
    folder = tmp_path / "clone"
    for name in ("data.dvc", ".dvcignore", ".dvc/config", ".dvc/.gitignore"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((CHECKOUT / name).read_bytes())
    shutil.copytree(CHECKOUT / "infra" / "dvc-remote", folder / "infra" / "dvc-remote")
    (folder / ".gitignore").write_text("/data/\n", encoding="utf-8")
    commit(folder, "corpus")
    return folder
