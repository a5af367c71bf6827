"""The store on S3. What is published is there; what is at work is in a folder of this machine.

    manifests/<stage>/<fingerprint>.json         written last, by a conditional put: it makes the artifact
    artifacts/<stage>/<fingerprint>/<seal>/...   its files; those that no manifest names do not exist
    scratch/<stage>-<resume key>/...             checkpoints of unfinished work; see `checkpoint_mirror.py`
    leases/, runs/<run id>/, registry/           who works on what; records and reports of runs; champions

The folder on this machine, below $INGOT_CACHE, is laid out like a local store: copies of artifacts, scratch, and locks
between the processes of this machine.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.core import artifact, disk, lock, object_lease
from pipelines.core.artifact import Artifact
from pipelines.core.bucket import Bucket, ConflictError, Entry
from pipelines.core.checkpoint_mirror import CheckpointMirror
from pipelines.core.errors import IntegrityError, LockLost
from pipelines.core.fault_injection import fault_point
from pipelines.core.late_writer import LateWriter
from pipelines.core.object_cache import ObjectCache
from pipelines.core.object_lease import Held, ObjectLease
from pipelines.core.store import CACHE_VARIABLE, GARBAGE, MARKER, Lease, LocalStore, short

_KNOWN = "known"
"""Folder with copies of small texts: the tag on the first line, then the text."""
_ABANDONED_S = 24 * 3600.0
"""An upload without a manifest that nothing was added to for so long belongs to nobody."""
_READERS = 16


class ObjectStore:
    """Artifacts in a bucket, and the folder of this machine that they are made and copied in.

    Args:
        address: `s3://BUCKET/PREFIX`.

    Raises:
        ConfigError: it is no such address.
    """

    def __init__(self, address: str) -> None:
        self._bucket = Bucket(address)
        self.address = self._bucket.address
        self.root = _folder(self.address)
        self._here = LocalStore(self.root)
        self._cache = ObjectCache(self.root, self._bucket)
        self._late = LateWriter(self._bucket.write)
        if not (self.root / MARKER).exists():
            self._here.write(MARKER, json.dumps({"address": self.address}))

    # ---- artifacts ---------------------------------------------------------------------------------------------------

    def path(self, stage: str, key: str) -> Path:
        """Return the folder of this machine where the copy of an artifact lies or would lie."""
        return self._here.path(stage, key)

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the published artifact with the fingerprint `key`, or None; a damaged manifest counts as none."""
        name = _manifest(stage, key)
        there = self._bucket.read(name) if key else None
        try:
            found = None if there is None else self._artifact(name, there.text)
        except IntegrityError:
            return None
        return found if found is not None and found.manifest.fingerprint == key else None

    def _artifact(self, name: str, text: str) -> Artifact:
        manifest = artifact.parse(text, self._bucket.place(name))
        folder = self.path(manifest.stage, manifest.fingerprint)
        return Artifact(folder, manifest, _Copied(self._bucket, self._cache, text))

    def verify(self, used: Artifact) -> None:
        """Bring an artifact here, and verify it where that was not done lately; a damaged copy is brought anew.

        Raises:
            IntegrityError: what is in the bucket is damaged: naming the file, the expected and the actual sha256.
        """
        _ = used.path
        try:
            self._here.verify(used)
        except IntegrityError:
            self._cache.drop(used.folder)
            _ = used.path

    def artifacts(self) -> Iterator[Artifact]:
        """Yield every published artifact, oldest first, without those whose manifest is damaged."""
        for name, text in self._manifests():
            with contextlib.suppress(IntegrityError):
                yield self._artifact(name, text)

    def damaged(self) -> Iterator[IntegrityError]:
        """Yield an error for every manifest that cannot be trusted."""
        for name, text in self._manifests():
            try:
                self._artifact(name, text)
            except IntegrityError as error:
                yield error

    def _manifests(self) -> Iterator[tuple[str, str]]:
        entries = sorted(self._bucket.entries("manifests/"), key=lambda entry: (entry.modified, entry.name))
        texts = self._texts_of(entries)
        return ((name, text) for name, text in texts.items() if text.strip())  # else a fence; see `object_lease.py`

    def publish(self, build: Path, stage: str, key: str, lease: Lease, **facts: Any) -> Artifact:
        """Upload the files of an artifact, then its manifest, if nobody else has published it meanwhile.

        Raises:
            LockLost: the lease was taken over, and nothing was published.
        """
        assert isinstance(lease, ObjectLease)
        self._cache.use(self.path(stage, key))
        made = artifact.publish(build, self.path(stage, key), stage=stage, **facts)
        prefix, name = self._cache.payload(stage, key, made.manifest.seal), _manifest(stage, key)
        self._bucket.abort_uploads(f"artifacts/{stage}/{short(key)}/")  # of an attempt that was killed
        self._bucket.upload({prefix + file: made.folder / file for file in made.manifest.files})
        fault_point("store.after_payload", path=made.folder)
        before = self._bucket.read(name)
        lease.check(publishing=name)
        text = (made.folder / artifact.MANIFEST).read_text(encoding="utf-8")
        fault_point("store.before_manifest", path=made.folder)
        try:
            self._bucket.write(name, text, expected=None if before is None else before.etag, absent=before is None)
        except ConflictError:
            raise LockLost(
                f"{stage} {short(key)} was published by another process meanwhile", hint="run the same command again"
            ) from None
        if before is not None:
            self._remove_builds(stage, key, but=prefix)
        return Artifact(made.folder, made.manifest, _Copied(self._bucket, self._cache, text))

    def _remove_builds(self, stage: str, key: str, *, but: str) -> None:
        """Remove the files of an artifact that was made anew."""
        entries = self._bucket.entries(f"artifacts/{stage}/{short(key)}/")
        self._bucket.delete(*(entry.name for entry in entries if not entry.name.startswith(but)))

    def withdraw(self, stage: str, key: str) -> None:
        """Remove an artifact: its manifest first, then its files, and the copy on this machine."""
        self._bucket.delete(_manifest(stage, key))
        self.discard(self.path(stage, key))
        self._here.withdraw(stage, key)

    def build_folder(self, stage: str, resume_key: str) -> Path:
        """Return an empty folder of this machine to build in; the lease must be held."""
        return self._here.build_folder(stage, resume_key)

    # ---- unfinished work ---------------------------------------------------------------------------------------------

    def scratch(self, stage: str, resume_key: str) -> Path:
        """Return the scratch folder of a stage execution on this machine: the same one at every attempt."""
        return self._here.scratch(stage, resume_key)

    def has_scratch(self, stage: str, resume_key: str) -> bool:
        """Return whether an attempt has left something to go on from, here or in the bucket."""
        folder = self.scratch(stage, resume_key)
        return folder.is_dir() or bool(self._bucket.entries(f"scratch/{folder.name}/"))

    @contextlib.contextmanager
    def attempt(self, stage: str, resume_key: str, lease: Lease, journals: Collection[str]) -> Iterator[Path]:
        """Give the scratch folder, with the newest checkpoint of any machine; new ones are mirrored meanwhile."""
        with self._here.attempt(stage, resume_key, lease, journals) as folder:
            mirror = CheckpointMirror(self._bucket, folder, lease, journals)
            mirror.restore()
            mirror.start()
            try:
                yield folder
            except BaseException:
                mirror.stop(finish=True)
                raise
            mirror.stop(finish=False)

    def clear_scratch(self, stage: str, resume_key: str) -> None:
        """Remove what attempts have left, here and in the bucket; the artifact is published."""
        self.discard(self.scratch(stage, resume_key))

    # ---- locks -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lease(
        self, stage: str, resume_key: str, *, wait_s: float | None, inputs: Collection[str] = ()
    ) -> Iterator[Lease]:
        """Hold the right to build one artifact; its inputs are named in the lease."""
        name = f"{stage}-{short(resume_key)}"
        with self._held(f"leases/{name}", what=f"stage {name}", wait_s=wait_s, inputs=inputs) as held:
            if inputs:
                with self.registering():
                    pass  # a collection that began before the inputs were named is over now
            yield held

    def hold(self, name: str, *, what: str, wait_s: float | None) -> contextlib.AbstractContextManager[Lease]:
        """Hold the lock `name`, a path below the store without an ending."""
        return self._held(name, what=what, wait_s=wait_s)

    @contextlib.contextmanager
    def _held(
        self, name: str, *, what: str, wait_s: float | None, inputs: Collection[str] = ()
    ) -> Iterator[ObjectLease]:
        """Hold the kernel's lock between the processes of this machine, and the lease between machines."""
        began = time.monotonic()
        with lock.hold(self.root / f"{name}.lock", what=what, wait_s=wait_s):
            left = None if wait_s is None else max(0.0, wait_s - (time.monotonic() - began))
            with object_lease.hold(self._bucket, name, what=what, wait_s=left, inputs=inputs) as held:
                yield held

    def registering(self) -> contextlib.AbstractContextManager[Lease]:
        """Hold the lock under which runs and stages say what they need, and garbage is collected."""
        return self.hold(GARBAGE, what="the store, by `ingot gc`,", wait_s=None)

    def is_free(self, name: str) -> bool:
        """Return whether nobody holds the lock `name`, on any machine."""
        return object_lease.is_free(self._bucket, name)

    def inputs_in_use(self) -> set[str]:
        """Return the fingerprints of the artifacts that stages at work read, on any machine."""
        used = set[str]()
        for entry in self._bucket.entries("leases/"):
            there = self._bucket.read(entry.name)
            if there is not None and not (held := Held.of(there)).is_free(there.age_s):
                used.update(held.inputs)
        return used

    # ---- garbage -----------------------------------------------------------------------------------------------------

    def leftovers(self) -> Iterator[Path]:
        """Yield where files lie that no manifest names, and parts of uploads, once they are a day old."""
        named = {
            self._cache.payload(a.manifest.stage, a.manifest.fingerprint, a.manifest.seal) for a in self.artifacts()
        }
        newest: dict[str, float] = {}
        for entry in self._bucket.entries("artifacts/"):
            build = "/".join(PurePosixPath(entry.name).parts[:4]) + "/"
            newest[build] = max(newest.get(build, 0.0), entry.modified)
        old = {build for build, modified in newest.items() if time.time() - modified > _ABANDONED_S}
        parts = self._bucket.unfinished_uploads("artifacts/", older_than_s=_ABANDONED_S)
        old |= {"/".join(PurePosixPath(name).parts[:4]) + "/" for name in parts} - newest.keys()
        yield from (self.root / build for build in sorted(old - named))

    def scratches(self) -> list[Path]:
        """Return the scratch folders, as they would be here, of all stage executions that left something."""
        mirrored = [self.root / "scratch" / name for name in self._bucket.folders("scratch/")]
        return sorted({*mirrored, *self._here.scratches()})

    def discard(self, path: Path) -> bool:
        """Remove a folder below `root` here, and what has its name in the bucket."""
        prefix = f"{path.relative_to(self.root).as_posix()}/"
        self._bucket.delete(*(entry.name for entry in self._bucket.entries(prefix)))
        self._bucket.abort_uploads(prefix)
        return self._here.discard(path)

    def size_of(self, path: Path) -> int:
        """Return the bytes in the bucket below the name of a folder; of what is only here, those here."""
        prefix = f"{path.relative_to(self.root).as_posix()}/"
        return sum(entry.size for entry in self._bucket.entries(prefix)) or disk.size_of(path)

    # ---- texts -------------------------------------------------------------------------------------------------------

    def read(self, name: str) -> str | None:
        """Return a small text by its path below the store; None where there is none."""
        there = self._bucket.read(name)
        return None if there is None else there.text

    def texts(self, pattern: str) -> dict[str, str]:
        """Return the small texts whose names match a pattern with `*`, by name, in order of names."""
        depth = pattern.count("/")
        entries = self._bucket.entries(pattern.partition("*")[0])
        return self._texts_of(
            [e for e in entries if e.name.count("/") == depth and fnmatch.fnmatchcase(e.name, pattern)]
        )

    def _texts_of(self, entries: Collection[Entry]) -> dict[str, str]:
        """Return texts in the order of their entries; those that have not changed are read from this machine."""
        with ThreadPoolExecutor(_READERS) as pool:
            texts = pool.map(self._text_of, entries)
            return {entry.name: text for entry, text in zip(entries, texts, strict=True) if text is not None}

    def _text_of(self, entry: Entry) -> str | None:
        known = self.root / _KNOWN / entry.name
        with contextlib.suppress(OSError, UnicodeDecodeError):
            tag, _, text = known.read_text(encoding="utf-8").partition("\n")
            if tag == entry.etag:
                return text
        there = self._bucket.read(entry.name)
        if there is None:
            return None
        with contextlib.suppress(OSError):  # it is read again next time
            self._here.write(f"{_KNOWN}/{entry.name}", f"{there.etag}\n{there.text}")
        return there.text

    def modified(self, name: str) -> float | None:
        """Return when a text was last written, by the clock of the server; None where there is none."""
        there = self._bucket.read(name)
        return None if there is None else there.modified

    def write(self, name: str, text: str, *, wait: bool = True) -> None:
        """Write a small text; see `Store.write`."""
        if wait:
            self._late.forget(name)
            self._bucket.write(name, text)
        else:
            self._late.write(name, text)

    def create(self, name: str, text: str) -> bool:
        """Write a small text that is not there yet; return False where another was first."""
        try:
            self._bucket.write(name, text, absent=True)
        except ConflictError:
            return False
        return True

    def append(self, name: str, line: str) -> None:
        """Add a line; where somebody adds another at the same moment, both are kept."""
        while True:
            there = self._bucket.read(name)
            with contextlib.suppress(ConflictError):
                text = line + "\n" if there is None else f"{there.text}{line}\n"
                self._bucket.write(name, text, expected=None if there is None else there.etag, absent=there is None)
                return


class _Copied:
    """Brings the files of one artifact to this machine when they are asked for."""

    def __init__(self, bucket: Bucket, cache: ObjectCache, text: str) -> None:
        self._bucket, self._cache, self._text = bucket, cache, text

    def place(self, wanted: Artifact) -> str:
        """Return the address of its files."""
        manifest = wanted.manifest
        return self._bucket.place(self._cache.payload(manifest.stage, manifest.fingerprint, manifest.seal)).rstrip("/")

    def bring(self, wanted: Artifact) -> None:
        """Have all files in the folder of the artifact, verified."""
        self._cache.bring(wanted, self._text)

    def verify(self, wanted: Artifact) -> None:
        """Hash every file in the bucket."""
        self._cache.verify(wanted)


def _manifest(stage: str, key: str) -> str:
    return f"manifests/{stage}/{short(key)}.json"


def _folder(address: str) -> Path:
    """Return the folder of this machine for a store; $INGOT_CACHE may name variables, such as that of the node."""
    if (said := os.environ.get(CACHE_VARIABLE)) is None:
        caches = os.environ.get("XDG_CACHE_HOME")
        place = Path(caches) if caches else Path.home() / ".cache"
        said = str(place / "ingot")
    digest = hashlib.sha256(address.encode()).hexdigest()[:8]
    return (
        Path(os.path.expandvars(said)).expanduser().resolve()
        / f"{address.removeprefix('s3://').replace('/', '-')}-{digest}"
    )
