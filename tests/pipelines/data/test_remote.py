"""The corpus on S3: push to and pull from a real server (SeaweedFS) over the network of this machine."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.core.errors import IntegrityError
from pipelines.data import versioning
from pipelines.data.config import DataConfig

WEED = Path(sysconfig.get_path("scripts")) / "weed"
HERE = DataConfig()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an S3 server with an empty bucket `corpus`."""
    folder = tmp_path_factory.mktemp("weed")
    with contextlib.ExitStack() as stack:
        # Every listener gets a port of its own: servers of other tests may run beside this one.
        names = (
            "master.port",
            "volume.port",
            "filer.port",
            "s3.port",
            "s3.port.grpc",
            "s3.port.iceberg",
            "metricsPort",
        )
        names += ("master.port.grpc", "volume.port.grpc", "filer.port.grpc", "admin.port", "admin.port.grpc")
        sockets = {name: stack.enter_context(socket.create_server(("127.0.0.1", 0))) for name in names}
        ports = {name: one.getsockname()[1] for name, one in sockets.items()}
    log = (folder / "log").open("wb")
    server = subprocess.Popen(
        [
            str(WEED), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-bucket=corpus",
            "-webdav=false", "-admin.ui=false", *(f"-{name}={port}" for name, port in ports.items()),
        ],
        stdout=log,
        stderr=log,
    )  # fmt: skip
    try:
        wait_for(ports["s3.port"], server, folder / "log")
        yield f"http://127.0.0.1:{ports['s3.port']}"
    finally:
        server.kill()
        server.wait()
        log.close()


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(log.read_text()[-2000:])


@pytest.fixture
def on_s3(clone: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with a corpus of its own, whose default remote is on S3."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    (clone / ".dvc" / "config.local").write_text(
        "[core]\n    remote = store\n['remote \"store\"']\n"
        f"    url = s3://corpus/ingot\n    endpointurl = {s3}\n    verify = true\n",
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
