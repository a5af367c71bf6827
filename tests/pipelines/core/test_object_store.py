"""The store on S3, against a real server: machines that meet, sleep, die and come back, and a server that goes away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from pipelines.core import artifact, bucket, checkpoint_mirror, object_cache
from pipelines.core.artifact import Artifact
from pipelines.core.bucket import Bucket
from pipelines.core.errors import ConfigError, IntegrityError, LockedError, TransientError
from pipelines.core.fingerprint import digest
from pipelines.core.object_store import ObjectStore
from pipelines.core.store import open_store
from tests import s3_server
from tests.s3_server import S3Server

KEY = "ab" * 32
IDENTITY = {"stage": "prepare", "n": 1}


@pytest.fixture
def machine(s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ObjectStore]:
    """Return the store as a machine of its own has it, with an empty folder."""

    def make(name: str) -> ObjectStore:
        monkeypatch.setenv("INGOT_CACHE", str(tmp_path / name))
        return ObjectStore(s3_store)

    return make


def publish(store: ObjectStore, files: dict[str, bytes]) -> Artifact:
    key = digest(IDENTITY)
    with store.lease("prepare", key, wait_s=0) as lease:
        build = store.build_folder("prepare", key)
        for name, data in files.items():
            (build / name).write_bytes(data)
        return store.publish(build, "prepare", key, lease, node="prepare", identity=IDENTITY, parents={}, summary={})


# ---- leases ---------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, pathlib
from pipelines.core.store import open_store
from pipelines.core.errors import IngotError
store, here, key = open_store(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
with store.lease("prepare", key, wait_s=None) as lease:
    build = store.build_folder("prepare", key)
    (build / "by.txt").write_text("the holder")
    (here / "holding").touch()
    sys.stdin.readline()
    try:
        store.publish(build, "prepare", key, lease, node="p", identity={"stage": "prepare", "n": 1}, parents={},
                      summary={})
    except IngotError as error:
        print(type(error).__name__, error.message)
"""


@pytest.fixture
def holder(s3_store: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with a folder of its own that holds the lease, and publishes once it is told to."""
    environment = {**os.environ, "INGOT_CACHE": str(tmp_path / "of-holder"), "INGOT_LEASE_S": "3"}
    arguments = [s3_store, str(tmp_path), digest(IDENTITY)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, *arguments], env=environment, **pipes) as process:
        wait_for((tmp_path / "holding").exists)
        yield process
        process.kill()


def wait_for(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_holder_that_slept_past_its_lease_cannot_publish(
    machine: Callable[[str], ObjectStore],
    holder: subprocess.Popen[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = machine("other")
    monkeypatch.setattr("pipelines.core.object_lease.LEASE_S", 3.0)
    with pytest.raises(LockedError, match=f"locked by process {holder.pid}"):
        publish(store, {"by.txt": b"the other"})
    holder.send_signal(signal.SIGSTOP)
    with store.lease("prepare", digest(IDENTITY), wait_s=60):
        holder.send_signal(signal.SIGCONT)
        said, _ = holder.communicate("now\n", timeout=60)
    assert said.startswith("LockLost stage prepare-")
    assert list(store.artifacts()) == []
    assert publish(store, {"by.txt": b"the other"}).digest == next(store.artifacts()).digest


def test_a_holder_that_was_suspended_in_its_last_write_is_shut_out(machine: Callable[[str], ObjectStore]) -> None:
    """The lease is checked, and then the manifest is written: in between, somebody else takes over."""
    from pipelines.core import object_lease

    store, place = machine("one"), Bucket(machine("one").address)
    sleeping = object_lease.ObjectLease(place, "leases/x", "x")
    assert sleeping._try() is None
    sleeping.check(publishing="manifests/prepare/x.json")
    object_lease_s, object_lease.LEASE_S = object_lease.LEASE_S, -1.0
    try:
        with object_lease.hold(place, "leases/x", what="x", wait_s=0) as other:
            assert other.token == sleeping.token + 1
    finally:
        object_lease.LEASE_S = object_lease_s
    with pytest.raises(bucket.ConflictError):
        place.write("manifests/prepare/x.json", "{}", absent=True)
    assert list(store.artifacts()) == list(store.damaged()) == []


def test_a_dead_holder_on_this_machine_is_replaced_at_once(
    machine: Callable[[str], ObjectStore], holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.wait()
    assert publish(machine("other"), {"by.txt": b"the other"}).manifest.files["by.txt"].size == 9


def test_two_machines_that_want_the_same_lease_get_it_one_after_the_other(
    machine: Callable[[str], ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.core.object_lease._POLL_S", 0.02)
    stores, inside, most = [machine("one"), machine("two")], [0], [0]

    def work(store: ObjectStore) -> None:
        for _ in range(3):
            with store.lease("prepare", KEY, wait_s=None):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.02)
                inside[0] -= 1

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, inside) == ([1], [0])


# ---- copies ---------------------------------------------------------------------------------------------------------


def test_eight_readers_of_one_host_download_a_file_once(
    machine: Callable[[str], ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(machine("maker"), {"shard.bin": b"x" * 100_000})
    readers = [machine("host") for _ in range(8)]
    downloads: list[str] = []
    download = Bucket.download

    def counted(self: Bucket, files: dict[str, Path]) -> None:
        downloads.extend(files)
        download(self, files)

    monkeypatch.setattr(Bucket, "download", counted)
    sizes: list[int] = []

    def read(store: ObjectStore) -> None:
        (found,) = store.artifacts()
        sizes.append((found.path / "shard.bin").stat().st_size)

    threads = [threading.Thread(target=read, args=(store,)) for store in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sizes, len(downloads)) == ([100_000] * 8, 1)


def test_a_damaged_copy_is_brought_anew_and_a_damaged_object_is_named(machine: Callable[[str], ObjectStore]) -> None:
    made = publish(machine("maker"), {"shard.bin": b"right"})
    reader = machine("reader")
    (found,) = reader.artifacts()
    reader.verify(found)
    (found.folder / "shard.bin").write_bytes(b"wrong")
    reader.verify(found)
    assert (found.folder / "shard.bin").read_bytes() == b"right"
    name = object_cache.ObjectCache.payload("prepare", made.manifest.fingerprint, made.manifest.seal) + "shard.bin"
    Bucket(reader.address).write(name, "wrong")
    (there,) = machine("another").artifacts()
    with pytest.raises(IntegrityError, match=rf"s3://.*shard\.bin does not match .* expected sha256 {digest_of(made)}"):
        _ = there.path
    assert next(reader.artifacts()).path == found.folder  # the copy is whole
    with pytest.raises(IntegrityError, match=r"shard\.bin does not match"):
        found.verify()


def digest_of(made: Artifact) -> str:
    return made.manifest.files["shard.bin"].sha256


def test_the_cache_stays_below_its_limit_and_keeps_what_is_in_use(
    machine: Callable[[str], ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INGOT_CACHE_GB", "0.00025")
    maker, keys = machine("maker"), []
    for number in range(3):
        identity = {"stage": "prepare", "n": number}
        keys.append(digest(identity))
        with maker.lease("prepare", keys[-1], wait_s=0) as lease:
            build = maker.build_folder("prepare", keys[-1])
            (build / "shard.bin").write_bytes(bytes([number]) * 100_000)
            maker.publish(build, "prepare", keys[-1], lease, node="p", identity=identity, parents={}, summary={})
    reader = machine("reader")
    found = [reader.find("prepare", key) for key in keys]
    assert found[0] is not None
    assert found[1] is not None
    assert found[2] is not None
    first, second = found[0].path, found[1].path
    os.close(object_cache._IN_USE.pop(first))  # as if the process that used it had ended
    third = found[2].path
    assert [path.exists() for path in (first, second, third)] == [False, True, True]
    assert (found[0].path / "shard.bin").stat().st_size == 100_000  # brought again


def test_what_was_uploaded_without_a_manifest_is_no_artifact_and_an_aborted_upload_leaves_nothing(
    machine: Callable[[str], ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = machine("maker")
    client, prefix = boto3.client("s3"), store.address.removeprefix(f"s3://{s3_server.BUCKET}/")
    begun = f"{prefix}/artifacts/prepare/{digest(IDENTITY)[:32]}/{'0' * 16}/shard.bin"
    part = client.create_multipart_upload(Bucket=s3_server.BUCKET, Key=begun)
    client.upload_part(
        Bucket=s3_server.BUCKET, Key=begun, UploadId=part["UploadId"], PartNumber=1, Body=b"x" * 5_300_000
    )
    Bucket(store.address).write(f"artifacts/prepare/{'cd' * 16}/{'1' * 16}/shard.bin", "half an artifact")
    assert list(store.artifacts()) == list(store.leftovers()) == []  # it may still be at work
    monkeypatch.setattr("pipelines.core.object_store._ABANDONED_S", -60.0)
    assert len(list(store.leftovers())) == 2
    publish(store, {"shard.bin": b"x"})
    assert "Uploads" not in client.list_multipart_uploads(Bucket=s3_server.BUCKET, Prefix=f"{prefix}/")
    assert all(store.discard(path) for path in store.leftovers())
    assert list(store.leftovers()) == []


def test_a_large_file_goes_and_comes_in_parts(
    machine: Callable[[str], ObjectStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(bucket, "_PART_BYTES", 5 * 2**20)
    place, data = Bucket(machine("one").address), bytes(range(256)) * 24_000
    (tmp_path / "large").write_bytes(data)
    place.upload({"large": tmp_path / "large"})
    place.download({"large": tmp_path / "back"})
    assert (tmp_path / "back").read_bytes() == data
    with pytest.raises(FileNotFoundError, match=r"s3://.*/none"):
        place.download({"large": tmp_path / "back", "none": tmp_path / "none"})


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, step: int) -> None:
    build = folder / "checkpoints" / f".writing-{step}"
    build.mkdir(parents=True)
    (build / "rank-00000.safetensors").write_text(f"weights {step}")
    facts: dict[str, Any] = {"stage": "checkpoint", "node": "pretrain", "parents": {}, "summary": {}}
    # Journals first, as training does: the mirror may look between any two lines.
    (folder / "losses.jsonl").write_text("".join(f"{n}\n" for n in range(step)))
    artifact.publish(build, folder / "checkpoints" / f"step-{step:08d}", identity={"step": step}, **facts)


def stopped_attempt(store: ObjectStore, *steps: int) -> None:
    """Train until a checkpoint and fail, as a machine does that is told to go away."""

    def train() -> None:
        with (
            store.lease("pretrain", KEY, wait_s=0) as lease,
            store.attempt("pretrain", KEY, lease, ("*.jsonl",)) as scratch,
        ):
            for step in steps:
                checkpoint(scratch, step)
            raise OSError("told to go")

    with pytest.raises(OSError, match="told to go"):
        train()


def test_another_machine_goes_on_from_the_newest_valid_checkpoint(
    machine: Callable[[str], ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_mirror, "_LOOK_S", 0.01)
    first = machine("first")
    for step in (10, 20, 30):
        stopped_attempt(first, step)
    second = machine("second")
    assert second.has_scratch("pretrain", KEY)
    with second.lease("pretrain", KEY, wait_s=0) as lease, second.attempt("pretrain", KEY, lease, ()) as scratch:
        assert [path.name for path in scratch.glob("checkpoints/*")] == ["step-00000030"]
        artifact.load(scratch / "checkpoints" / "step-00000030").verify()
        assert (scratch / "losses.jsonl").read_text().count("\n") == 30
    mirrored = f"scratch/{first.scratch('pretrain', KEY).name}/checkpoints"
    Bucket(first.address).write(f"{mirrored}/step-00000030/rank-00000.safetensors", "damaged")
    third = machine("third")
    with third.lease("pretrain", KEY, wait_s=0) as lease, third.attempt("pretrain", KEY, lease, ()) as scratch:
        assert [path.name for path in scratch.glob("checkpoints/*")] == ["step-00000020"]
    third.clear_scratch("pretrain", KEY)
    assert not machine("fourth").has_scratch("pretrain", KEY)


def test_an_attempt_that_ends_says_what_is_not_mirrored_yet(
    machine: Callable[[str], ObjectStore], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = machine("first")
    monkeypatch.setattr(checkpoint_mirror, "_LAST_S", 0.2)
    monkeypatch.setattr(Bucket, "upload", lambda *_: time.sleep(5))
    stopped_attempt(store, 10)
    assert "step-00000010 is not in the store yet, newest there: none" in caplog.text


# ---- a server that refuses or is away -------------------------------------------------------------------------------


def test_wrong_credentials_and_a_missing_bucket_are_named_at_once_and_no_secret_is_told(
    s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"there is no bucket nowhere at http://127\.0\.0\.1"):
        list(open_store("s3://nowhere/x").artifacts())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an0ther-s3cret")
    with pytest.raises(ConfigError, match="refuses these credentials") as told:
        list(ObjectStore(s3_store).artifacts())
    assert "s3cret" not in str(told.value)
    assert "AWS_SECRET_ACCESS_KEY" in str(told.value)
    for address in ("s3://", "s3://UPPER/x", "s3://corpus/../x"):
        with pytest.raises(ConfigError, match="is no address of a bucket"):
            ObjectStore(address)


def test_a_server_that_comes_back_is_waited_for_and_one_that_stays_away_ends_with_a_clear_fault(
    machine: Callable[[str], ObjectStore], monkeypatch: pytest.MonkeyPatch, s3: S3Server
) -> None:
    store = machine("one")
    publish(store, {"shard.bin": b"x" * 1000})
    # A port that nobody listens on, and then one that passes on to the server.
    away = bucket.Bucket(store.address)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(bucket, "PATIENCE_S", 0.5)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(TransientError, match=r"s3://.* at http://127\.0\.0\.1:9 does not answer") as told:
        away.read("x")
    assert told.value.exit_code == 4
    monkeypatch.setattr(bucket, "PATIENCE_S", 60.0)
    with s3.away():
        returned = threading.Timer(2.0, s3.process.send_signal, [signal.SIGCONT])
        returned.start()
        assert len(list(store.artifacts())) == 1
        returned.join()


def test_a_run_record_tells_the_address_and_no_credential(
    machine: Callable[[str], ObjectStore], s3_store: str, tmp_path: Path
) -> None:
    publish(machine("one"), {"shard.bin": b"x"})
    written = [path for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert json.loads(next(path for path in written if path.name == "store.json").read_text()) == {"address": s3_store}
    assert not any(s3_server.SECRET.encode() in path.read_bytes() for path in written)
