"""Transfers to and from a store on S3 beside plain s3fs, of the same files, in the same run.

    python -m tests.bench.bench_store

A SeaweedFS server of this machine serves both; rounds alternate, and the best of each is compared, because what else
the machine does slows both. `publish` and `bring` are what a stage waits for: hashes, fsync and the manifest included.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import s3fs

from pipelines.core.bucket import Bucket
from pipelines.core.fingerprint import digest
from pipelines.core.object_store import ObjectStore
from tests import s3_server

FILES = {"large": (6, 32_000_000), "small": (100, 100_000)}
ROUNDS = 5


def main() -> None:
    """Print seconds and ratios for large and small files."""
    with tempfile.TemporaryDirectory() as folder, s3_server.serve(Path(folder) / "server") as server:
        os.environ.update(server.environment, INGOT_CACHE=f"{folder}/cache")
        for name, (count, size) in FILES.items():
            source = Path(folder) / name
            source.mkdir()
            for number in range(count):
                (source / f"{number}.bin").write_bytes(os.urandom(size))
            _compare(name, source, Path(folder) / "here", count * size)


def _compare(name: str, source: Path, target: Path, total: int) -> None:
    ours, theirs = Bucket(f"s3://{s3_server.BUCKET}/ours-{name}"), s3fs.S3FileSystem(use_listings_cache=False)
    files = sorted(source.iterdir())
    places = [f"{s3_server.BUCKET}/theirs-{name}/{path.name}" for path in files]
    moves: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "put": (
            lambda: ours.upload({path.name: path for path in files}),
            lambda: theirs.put([str(path) for path in files], places),
        ),
        "get": (
            lambda: ours.download({path.name: target / path.name for path in files}),
            lambda: theirs.get(places, [str(target / path.name) for path in files]),
        ),
    }
    for move, both in moves.items():
        best = [float("inf"), float("inf")]
        for turn in range(2 * ROUNDS):
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            best[turn % 2] = min(best[turn % 2], _seconds(both[turn % 2]))
        print(
            f"{name} {move}: ours {best[0]:.3f} s, s3fs {best[1]:.3f} s, {total / 1e6:.0f} MB; "
            f"speed of ours over that of s3fs {best[1] / best[0]:.2f}",
            flush=True,
        )
    store, key = ObjectStore(ours.address), digest({"stage": "bench", "name": name})
    with store.lease("bench", key, wait_s=0) as lease:
        build = store.build_folder("bench", key)
        shutil.copytree(source, build, dirs_exist_ok=True)
        identity = {"stage": "bench", "name": name}
        publish = _seconds(
            lambda: store.publish(build, "bench", key, lease, node="n", identity=identity, parents={}, summary={})
        )
    made = next(store.artifacts())
    shutil.rmtree(made.folder)
    print(f"{name}: publish {publish:.3f} s, bring {_seconds(lambda: made.path):.3f} s", flush=True)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
