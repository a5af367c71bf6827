"""The store: where artifacts live, found by stage and fingerprint.

.ingot/artifacts/<stage>/<fingerprint>/   published artifacts
.ingot/scratch/<stage>-<resume key>/      what an unfinished stage keeps between attempts (checkpoints)
.ingot/verified/                          hashes of files that a run has verified, while they stay as they are
.ingot/leases/                            who works on what
.ingot/runs/<run id>/                     record and report of each run

`store.path` is a folder, or `s3://BUCKET/PREFIX`; see `object_store.py` for what lies where then.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

from pipelines.core import artifact, disk, fingerprint, lock
from pipelines.core.artifact import Artifact
from pipelines.core.errors import IntegrityError
from pipelines.core.hash_memo import HashMemo

SCHEME = "s3://"
CACHE_VARIABLE = "INGOT_CACHE"
"""Names the folder for what a store on S3 has on this machine."""
MARKER = "store.json"
"""In the folder that a store on S3 has on this machine: its address."""
KEY_DIGITS = 32
INPUTS = ".inputs"
BUILDING = ".building-"
"""Beginning of the name of a folder in which an artifact is made."""
_VERIFIED_S = 24 * 3600.0
"""How long a verification counts: longer than the nodes of most runs are apart, shorter than disks take to rot."""


class Lease(Protocol):
    """The right to build one artifact."""

    def check(self) -> None:
        """Make sure that it is still held.

        Raises:
            LockLost: somebody has taken over, because its holder showed no sign of life for too long.
        """


class Store(Protocol):
    """Artifacts, what unfinished work keeps, leases, and the small texts that say what was done."""

    root: Path
    """Folder on this machine: that of the store itself, or of an object store's cache and scratch."""
    address: str
    """What `store.path` says, whole: another process opens the same store with it."""

    def path(self, stage: str, key: str) -> Path:
        """Return the folder on this machine where the artifact with the fingerprint `key` lies or would lie."""

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the published artifact with the fingerprint `key`, or None; a damaged manifest counts as none."""

    def verify(self, used: Artifact) -> None:
        """Verify an artifact before it is read, where that was not done lately.

        Raises:
            IntegrityError: naming the file, the expected and the actual sha256.
        """

    def artifacts(self) -> Iterator[Artifact]:
        """Yield every published artifact, oldest first, without those whose manifest is damaged."""

    def damaged(self) -> Iterator[IntegrityError]:
        """Yield an error for every published artifact whose manifest cannot be trusted."""

    def publish(self, build: Path, stage: str, key: str, lease: Lease, **facts: Any) -> Artifact:
        """Turn the folder `build` into the artifact with the fingerprint `key`.

        Args:
            build: a folder from `build_folder`, with the finished payload.
            stage: stage name.
            key: fingerprint.
            lease: the right to do so.
            facts: further arguments of `pipelines.core.artifact.publish`.

        Raises:
            LockLost: the lease was taken over, and nothing was published.
        """

    def withdraw(self, stage: str, key: str) -> None:
        """Remove an artifact; no reader ever sees one that lacks files."""

    def build_folder(self, stage: str, resume_key: str) -> Path:
        """Return an empty folder on the file system of `root` to build in; the lease must be held.

        What an earlier, killed attempt left there is removed.
        """

    def scratch(self, stage: str, resume_key: str) -> Path:
        """Return the scratch folder of a stage execution on this machine: the same one at every attempt."""

    def has_scratch(self, stage: str, resume_key: str) -> bool:
        """Return whether an attempt has left something to go on from."""

    def attempt(
        self, stage: str, resume_key: str, lease: Lease, journals: Collection[str]
    ) -> contextlib.AbstractContextManager[Path]:
        """Give the scratch folder to an attempt, with what earlier ones left, wherever they ran.

        Args:
            stage: stage name.
            resume_key: what unfinished attempts at it share.
            lease: the right to do so.
            journals: patterns of files beside a folder `checkpoints` that going on from a checkpoint takes.
        """

    def clear_scratch(self, stage: str, resume_key: str) -> None:
        """Remove what attempts have left; the artifact is published."""

    def lease(
        self, stage: str, resume_key: str, *, wait_s: float | None, inputs: Collection[str] = ()
    ) -> contextlib.AbstractContextManager[Lease]:
        """Hold the right to build one artifact; see `pipelines.core.lock.hold`.

        Args:
            stage: stage name.
            resume_key: what unfinished attempts at it share.
            wait_s: how long to wait for another holder; None waits for ever.
            inputs: fingerprints of the artifacts that are read meanwhile, which `ingot gc` then leaves in place.
        """

    def hold(self, name: str, *, what: str, wait_s: float | None) -> contextlib.AbstractContextManager[Lease]:
        """Hold the lock `name`, a path below the store without an ending; `what` is it for messages."""

    def registering(self) -> contextlib.AbstractContextManager[Lease]:
        """Hold the lock under which runs and stages say what they need, and garbage is collected."""

    def is_free(self, name: str) -> bool:
        """Return whether nobody holds the lock `name`."""

    def inputs_in_use(self) -> set[str]:
        """Return the fingerprints of the artifacts that stages at work read."""

    def leftovers(self) -> Iterator[Path]:
        """Yield folders, as they would be below `root`, of attempts to publish that came to nothing."""

    def scratches(self) -> list[Path]:
        """Return the scratch folders of all stage executions that left something."""

    def discard(self, path: Path) -> bool:
        """Remove a folder below `root`, also where the store is elsewhere; return whether it is gone."""

    def size_of(self, path: Path) -> int:
        """Return the bytes in the store of what lies, or would lie, in a folder below `root`."""

    def read(self, name: str) -> str | None:
        """Return a small text by its path below the store; None where there is none."""

    def texts(self, pattern: str) -> dict[str, str]:
        """Return the small texts whose names match a pattern with `*`, by name, in order of names."""

    def modified(self, name: str) -> float | None:
        """Return when a text was last written, in seconds since 1970; None where there is none."""

    def write(self, name: str, text: str, *, wait: bool = True) -> None:
        """Write a small text; readers see the old or the new one.

        Args:
            name: path below the store.
            text: what to write.
            wait: return when others can see it; else soon after, unless a newer text takes its place.
        """

    def create(self, name: str, text: str) -> bool:
        """Write a small text that is not there yet; return False where another was first."""

    def append(self, name: str, line: str) -> None:
        """Add a line to a small text, durably; nobody's line is lost."""


def open_store(address: str | Path, start: Path | None = None) -> Store:
    """Return a store by what `store.path` says, or by its folder on this machine.

    Args:
        address: a folder, or `s3://BUCKET/PREFIX`.
        start: where a relative path starts; the working directory if left out.

    Raises:
        ConfigError: it is no such address.
    """
    text = str(address)
    if not text.startswith(SCHEME):
        path = (start or Path()) / text
        try:
            text = json.loads((path / MARKER).read_text(encoding="utf-8"))["address"]
        except (OSError, ValueError, KeyError, TypeError):
            return LocalStore(path)
    return _object_store(text, os.environ.get(CACHE_VARIABLE))


@functools.cache
def _object_store(address: str, cache: str | None) -> Store:  # noqa: ARG001
    """Return the store of an address, one in a process for each cache: its client takes a second to make."""
    from pipelines.core.object_store import ObjectStore

    return ObjectStore(address)


class _KernelLease:
    """A lock that the kernel keeps for as long as its holder lives: there is nothing to check."""

    def check(self) -> None:
        """Return at once."""


class LocalStore:
    """Artifacts in a folder of this machine, or one that machines share.

    Args:
        root: the folder; created when first written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.address = str(self.root)

    # ---- artifacts ---------------------------------------------------------------------------------------------------

    def path(self, stage: str, key: str) -> Path:
        """Return where the artifact with the fingerprint `key` lives or would live."""
        return self.root / "artifacts" / stage / key[:KEY_DIGITS]

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the published artifact with the fingerprint `key`, or None; a damaged manifest counts as none."""
        try:
            stored = artifact.load(self.path(stage, key))
        except IntegrityError:
            return None
        return stored if stored.manifest.fingerprint == key else None

    def verify(self, used: Artifact) -> None:
        """Verify an artifact before it is read; files that were verified lately and have not changed are not read.

        What is known is kept in the store, so that the nodes of a run verify an input once, whichever process they
        run in. `Artifact.verify` hashes every byte.

        Raises:
            IntegrityError: naming the file, the expected and the actual sha256.
        """
        record = self._verified(used.folder)
        memo = HashMemo(record, fingerprint.hash_file, max_age_s=_VERIFIED_S)
        for name, file in used.manifest.files.items():
            artifact.verify_file(used.folder / name, file, memo.hash)
        memo.save()

    def _verified(self, folder: Path) -> Path:
        return self.root / "verified" / f"{folder.parent.name}-{folder.name}.json"

    def artifacts(self) -> Iterator[Artifact]:
        """Yield every published artifact, oldest first, without those whose manifest is damaged."""
        for folder in self._folders():
            with contextlib.suppress(IntegrityError):
                yield artifact.load(folder)

    def damaged(self) -> Iterator[IntegrityError]:
        """Yield an error for every published folder whose manifest cannot be trusted."""
        for folder in self._folders():
            try:
                artifact.load(folder)
            except IntegrityError as error:
                yield error

    def _folders(self) -> list[Path]:
        """Return every published folder, oldest first; folders of unfinished work start with a dot."""
        manifests = self._glob("artifacts/*/[!.]*/" + artifact.MANIFEST)
        return [path.parent for path in sorted(manifests, key=lambda p: (p.stat().st_mtime, p))]

    def publish(self, build: Path, stage: str, key: str, lease: Lease, **facts: Any) -> Artifact:  # noqa: ARG002
        """Turn the folder `build` into an artifact by one rename; the kernel's lock needs no check."""
        return artifact.publish(build, self.path(stage, key), stage=stage, **facts)

    def withdraw(self, stage: str, key: str) -> None:
        """Remove an artifact; it gets another name first, so that no reader ever sees one that lacks files."""
        folder = self.path(stage, key)
        retired = folder.with_name(f"{artifact.RETIRED}{folder.name}-{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            folder.rename(retired)
        self._verified(folder).unlink(missing_ok=True)
        shutil.rmtree(retired, ignore_errors=True)

    def build_folder(self, stage: str, resume_key: str) -> Path:
        """Return an empty folder on the store's file system to build in; the lease must be held.

        What an earlier, killed attempt left there is removed.
        """
        folder = self.root / "artifacts" / stage / f"{BUILDING}{short(resume_key)}"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder

    # ---- unfinished work ---------------------------------------------------------------------------------------------

    def scratch(self, stage: str, resume_key: str) -> Path:
        """Return the scratch folder of a stage execution: the same one at every attempt."""
        return self.root / "scratch" / f"{stage}-{short(resume_key)}"

    def has_scratch(self, stage: str, resume_key: str) -> bool:
        """Return whether an attempt has left something to go on from."""
        return self.scratch(stage, resume_key).is_dir()

    @contextlib.contextmanager
    def attempt(self, stage: str, resume_key: str, lease: Lease, journals: Collection[str]) -> Iterator[Path]:  # noqa: ARG002
        """Give the scratch folder, which holds what earlier attempts left."""
        folder = self.scratch(stage, resume_key)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder

    def clear_scratch(self, stage: str, resume_key: str) -> None:
        """Remove what attempts have left; the artifact is published."""
        shutil.rmtree(self.scratch(stage, resume_key), ignore_errors=True)

    # ---- locks -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lease(
        self, stage: str, resume_key: str, *, wait_s: float | None, inputs: Collection[str] = ()
    ) -> Iterator[Lease]:
        """Hold the right to build one artifact; see `Store.lease`."""
        name = f"{stage}-{short(resume_key)}"
        with self.hold(f"leases/{name}", what=f"stage {name}", wait_s=wait_s) as held:
            note = self.root / "leases" / f"{name}{INPUTS}"
            if inputs:
                with self.registering():
                    artifact.write_text(note, json.dumps(sorted(inputs)))
            try:
                yield held
            finally:
                note.unlink(missing_ok=True)

    @contextlib.contextmanager
    def hold(self, name: str, *, what: str, wait_s: float | None) -> Iterator[Lease]:
        """Hold the lock `name`, a path below the store without an ending."""
        with lock.hold(self.root / f"{name}.lock", what=what, wait_s=wait_s):
            yield _KernelLease()

    def registering(self) -> contextlib.AbstractContextManager[Lease]:
        """Hold the lock under which runs and stages say what they need, and garbage is collected."""
        return self.hold(GARBAGE, what="the store, by `ingot gc`,", wait_s=None)

    def is_free(self, name: str) -> bool:
        """Return whether nobody holds the lock `name`."""
        return not lock.is_held(self.root / f"{name}.lock")

    def inputs_in_use(self) -> set[str]:
        """Return the fingerprints of the artifacts that stages at work read."""
        used = set[str]()
        for note in self.root.glob(f"leases/*{INPUTS}"):
            if not self.is_free(f"leases/{note.name.removesuffix(INPUTS)}"):
                with contextlib.suppress(FileNotFoundError):  # it has finished meanwhile
                    used.update(json.loads(note.read_text(encoding="utf-8")))
        return used

    # ---- garbage -----------------------------------------------------------------------------------------------------

    def leftovers(self) -> Iterator[Path]:
        """Yield nothing: an attempt to publish leaves its build folder only."""
        yield from ()

    def scratches(self) -> list[Path]:
        """Return the scratch folders of all stage executions that left something."""
        return sorted(self.root.glob("scratch/*-*"))

    def discard(self, path: Path) -> bool:
        """Remove a folder; return whether it is gone."""
        shutil.rmtree(path, ignore_errors=True)
        return not path.exists()

    def size_of(self, path: Path) -> int:
        """Return the bytes of all files in a folder."""
        return disk.size_of(path)

    # ---- texts -------------------------------------------------------------------------------------------------------

    def read(self, name: str) -> str | None:
        """Return a small text by its path below the store; None where there is none."""
        try:
            return (self.root / name).read_text(encoding="utf-8", errors="surrogateescape")
        except FileNotFoundError:
            return None
        except IsADirectoryError:
            return ""

    def _glob(self, pattern: str) -> list[Path]:
        """Return the files that match a pattern, in order.

        Raises:
            PermissionError: one of the outer folders may not be read, which `Path.glob` takes for an empty one.
        """
        for folder in (self.root, self.root / pattern.partition("/")[0]):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.scandir(folder).close()
        return sorted(self.root.glob(pattern))

    def texts(self, pattern: str) -> dict[str, str]:
        """Return the small texts whose names match a pattern with `*`, by name, in order of names."""
        names = [path.relative_to(self.root).as_posix() for path in self._glob(pattern)]
        return {name: text for name in names if (text := self._readable(name)) is not None}

    def _readable(self, name: str) -> str | None:
        """Return a text; an empty one where this user may not read it, so that it hides no other."""
        try:
            return self.read(name)
        except PermissionError:
            return ""

    def modified(self, name: str) -> float | None:
        """Return when a text was last written, in seconds since 1970; None where there is none."""
        try:
            return (self.root / name).stat().st_mtime
        except FileNotFoundError:
            return None

    def write(self, name: str, text: str, *, wait: bool = True) -> None:  # noqa: ARG002
        """Write a small text at once; readers see the old or the new one."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        artifact.write_text(path, text)

    def create(self, name: str, text: str) -> bool:
        """Write a small text that is not there yet; return False where another was first."""
        path = self.root / name
        temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            artifact.sync(temporary)
            path.hardlink_to(temporary)  # unlike a rename, it replaces nothing
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        artifact.sync(path.parent)
        return True

    def append(self, name: str, line: str) -> None:
        """Add a line, durably; a line that a power cut left unfinished is closed off, never merged with this one."""
        path, text = self.root / name, line + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as stream:
            if (end := stream.tell()) and os.pread(stream.fileno(), 1, end - 1) != b"\n":
                text = "\n" + text
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())


GARBAGE = "leases/garbage"
"""The lock of `Store.registering`."""


def short(key: str) -> str:
    """Return the part of a fingerprint or resume key that names files."""
    return key[:KEY_DIGITS]
