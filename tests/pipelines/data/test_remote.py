"""The corpus on S3: push to and pull from a real server (SeaweedFS) over the network of this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.core.errors import IntegrityError
from pipelines.data import versioning
from pipelines.data.config import DataConfig
from tests.s3_server import S3Server

HERE = DataConfig()


@pytest.fixture
def on_s3(clone: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with a corpus of its own, whose default remote is on S3."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    (clone / ".dvc" / "config.local").write_text(
        "[core]\n    remote = store\n['remote \"store\"']\n"
        f"    url = s3://corpus/ingot\n    endpointurl = {s3.address}\n    verify = true\n",
        encoding="utf-8",
    )
    (clone / "data").mkdir()
    for name in ("a", "b"):
        (clone / "data" / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n' * 1000, encoding="utf-8")
    return clone


def test_a_corpus_pushed_to_s3_comes_back_the_same_and_an_unpushed_one_is_missing(on_s3: Path) -> None:
    versioning.add(HERE, on_s3)
    before = versioning.verify(HERE, on_s3)
    versioning.push(HERE, on_s3)
    forget(on_s3)
    versioning.ensure(HERE, on_s3)
    assert versioning.verify(HERE, on_s3) == before
    (on_s3 / "data" / "new.jsonl").write_text('{"text": "never pushed"}\n', encoding="utf-8")
    versioning.add(HERE, on_s3)
    forget(on_s3)
    with pytest.raises(IntegrityError, match="lacks an object"):
        versioning.pull(HERE, on_s3)


def forget(checkout: Path) -> None:
    """Remove everything but what git knows: the corpus in the work tree and the cache."""
    for folder in (checkout / "data", checkout / ".dvc" / "cache"):
        shutil.rmtree(folder)
