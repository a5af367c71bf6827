"""The copies of an object store's artifacts on this machine: brought once a host, verified, and of limited size.

A copy is a folder like that of a local store. It appears whole, by one rename, under a lock that all processes of the
host share, so eight ranks that need a corpus bring it once. A copy that a process has asked for is not removed before
that process ends; of the others, those go first that were not used for longest.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines.core import artifact, disk, fingerprint, lock, quantity
from pipelines.core.artifact import Artifact, FileRecord
from pipelines.core.bucket import Bucket
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.core.store import short

log = logging.getLogger(__name__)

SIZE_VARIABLE = "INGOT_CACHE_GB"
_FETCHING = ".fetching-"
_VERIFYING = ".verifying-"
_SHARE = 0.8
"""Of what is free and what it holds: how much of a disk the cache may take where nobody says."""
_SEAL_DIGITS = 16
_HASHERS = 4

_IN_USE: dict[Path, int] = {}
"""Folder -> descriptor of its lock, shared by every process that has asked for it, until that process ends."""


class ObjectCache:
    """Copies of artifacts in a folder.

    Args:
        root: folder of the store on this machine.
        bucket: where the artifacts are.
    """

    def __init__(self, root: Path, bucket: Bucket) -> None:
        self._root, self._bucket = root, bucket

    @staticmethod
    def payload(stage: str, key: str, seal: str) -> str:
        """Return the name below which the files of one build of an artifact lie in the bucket, ending in `/`."""
        return f"artifacts/{stage}/{short(key)}/{seal[:_SEAL_DIGITS]}/"

    def bring(self, wanted: Artifact, text: str) -> None:
        """Have all files of an artifact in its folder.

        Args:
            wanted: the artifact.
            text: its manifest, as it is in the bucket.

        Raises:
            IntegrityError: a file in the bucket is not what the manifest says, or is gone.
        """
        self.use(wanted.folder)
        if _is_whole(wanted):
            return
        stage, name = wanted.manifest.stage, wanted.folder.name
        with lock.hold(self._root / "leases" / f"fetch-{stage}-{name}.lock", what=f"the copy of {stage} {name}"):
            if _is_whole(wanted):
                return
            fetching = wanted.folder.with_name(f"{_FETCHING}{name}")
            self._make_room(wanted.size - disk.size_of(fetching), keep=wanted.folder)
            with disk.explained(f"the copy of {wanted.manifest.node}", fetching, remove=True):
                self._fetch(wanted, fetching)
                artifact.write_text(fetching / artifact.MANIFEST, text)
            self.drop(wanted.folder)
            fetching.rename(wanted.folder)

    def verify(self, wanted: Artifact) -> None:
        """Bring all files of an artifact once more and hash them, and keep none.

        Raises:
            IntegrityError: as of `bring`.
        """
        wanted.folder.parent.mkdir(parents=True, exist_ok=True)
        self._make_room(wanted.size, keep=wanted.folder)
        with tempfile.TemporaryDirectory(prefix=_VERIFYING, dir=wanted.folder.parent) as temporary:
            self._fetch(wanted, Path(temporary))

    def _fetch(self, wanted: Artifact, folder: Path) -> None:
        """Download what an earlier attempt has not brought, and verify all of it."""
        manifest = wanted.manifest
        prefix = self.payload(manifest.stage, manifest.fingerprint, manifest.seal)
        folder.mkdir(parents=True, exist_ok=True)
        missing = {name: file for name, file in manifest.files.items() if not _has_size(folder / name, file)}
        for name in missing:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._bucket.download({prefix + name: folder / name for name in missing})
        except FileNotFoundError as error:
            raise IntegrityError(
                f"{error} is gone: the artifact was removed or made anew meanwhile", hint="run the same command again"
            ) from None

        def verify(name: str) -> None:
            try:
                artifact.verify_file(folder / name, manifest.files[name], fingerprint.hash_file)
            except IntegrityError:
                found = fingerprint.hash_file(folder / name) if (folder / name).is_file() else "(missing)"
                (folder / name).unlink(missing_ok=True)
                raise IntegrityError(
                    f"{self._bucket.place(prefix + name)} does not match its manifest: expected sha256 "
                    f"{manifest.files[name].sha256}, found {found}",
                    hint=f"`ingot run --force {manifest.node}` makes it again",
                ) from None
            artifact.sync(folder / name)

        with ThreadPoolExecutor(_HASHERS) as pool:
            list(pool.map(verify, manifest.files))

    def use(self, folder: Path) -> None:
        """Keep the copy in a folder from being evicted until this process ends."""
        if folder not in _IN_USE:
            path = self._use_lock(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            _IN_USE[folder] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(_IN_USE[folder], fcntl.LOCK_SH)
        if (folder / artifact.MANIFEST).exists():
            os.utime(folder / artifact.MANIFEST)

    def drop(self, folder: Path) -> None:
        """Remove a copy; renamed first, so that nobody takes a part of it for the whole."""
        retired = folder.with_name(f"{artifact.RETIRED}{folder.name}-{os.getpid()}")
        if folder.exists():
            folder.rename(retired)
        shutil.rmtree(retired, ignore_errors=True)

    def _use_lock(self, folder: Path) -> Path:
        return self._root / "leases" / f"use-{folder.parent.name}-{folder.name}.lock"

    def _make_room(self, needed: int, *, keep: Path) -> None:
        """Remove copies that no process uses, those first that were not used for longest, until the rest fits."""
        copies = sorted(self._copies(), key=lambda folder: (folder / artifact.MANIFEST).stat().st_mtime)
        sizes = {folder: disk.size_of(folder) for folder in copies}
        limit = _limit(sum(sizes.values()) + disk.free(self._root))
        for folder in copies:
            if sum(sizes.values()) + needed <= limit:
                return
            if folder != keep and self._is_idle(folder):
                self.drop(folder)
                log.info("removed the copy %s (%s)", folder, quantity.size(sizes.pop(folder)))
        if sum(sizes.values()) + needed > limit:
            log.warning(
                "the cache %s will hold %s, above its limit of %s: all of it is in use",
                self._root, quantity.size(sum(sizes.values()) + needed), quantity.size(limit),
            )  # fmt: skip

    def _copies(self) -> Iterator[Path]:
        return (manifest.parent for manifest in self._root.glob(f"artifacts/*/[!.]*/{artifact.MANIFEST}"))

    def _is_idle(self, folder: Path) -> bool:
        with self._use_lock(folder).open("ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True


def _limit(room: int) -> int:
    """Return the bytes that the cache may take of `room`."""
    said = os.environ.get(SIZE_VARIABLE)
    if not said:
        return int(_SHARE * room)
    try:
        return int(float(said) * 1e9)
    except ValueError:
        raise ConfigError(f"{SIZE_VARIABLE} is {said!r}, not a number of gigabytes") from None


def _is_whole(wanted: Artifact) -> bool:
    try:
        return artifact.load(wanted.folder).manifest.seal == wanted.manifest.seal
    except IntegrityError:
        return False


def _has_size(path: Path, file: FileRecord) -> bool:
    return path.is_file() and path.stat().st_size == file.size
