"""The store: where artifacts live, found by stage and fingerprint.

.ingot/artifacts/<stage>/<fingerprint>/   published artifacts
.ingot/scratch/<stage>-<resume key>/      what an unfinished stage keeps between attempts (checkpoints)
.ingot/verified/                          hashes of files that a run has verified, while they stay as they are
.ingot/leases/                            who works on what
.ingot/runs/<run id>/                     record and report of each run
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from pipelines.core import artifact, fingerprint, lock
from pipelines.core.artifact import Artifact
from pipelines.core.errors import IntegrityError
from pipelines.core.hash_memo import HashMemo

_KEY_DIGITS = 32
_INPUTS = ".inputs"
BUILDING = ".building-"
"""Beginning of the name of a folder in which an artifact is made."""
_VERIFIED_S = 24 * 3600.0
"""How long a verification counts: longer than the nodes of most runs are apart, shorter than disks take to rot."""


class Store:
    """Artifacts in a local folder.

    Args:
        root: the folder; created when first written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def path(self, stage: str, key: str) -> Path:
        """Return where the artifact with the fingerprint `key` lives or would live."""
        return self.root / "artifacts" / stage / key[:_KEY_DIGITS]

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
        record = self._verified(used.path)
        memo = HashMemo(record, fingerprint.hash_file, max_age_s=_VERIFIED_S)
        for name, file in used.manifest.files.items():
            artifact.verify_file(used.path / name, file, memo.hash)
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
        manifests = self.root.glob("artifacts/*/[!.]*/" + artifact.MANIFEST)
        return [path.parent for path in sorted(manifests, key=lambda p: (p.stat().st_mtime, p))]

    def scratch(self, stage: str, resume_key: str) -> Path:
        """Return the scratch folder of a stage execution: the same one at every attempt."""
        return self.root / "scratch" / f"{stage}-{resume_key[:_KEY_DIGITS]}"

    @contextlib.contextmanager
    def lease(
        self, stage: str, resume_key: str, *, wait_s: float | None, inputs: Collection[str] = ()
    ) -> Iterator[None]:
        """Hold the right to build one artifact; see `pipelines.core.lock.hold`.

        Args:
            stage: stage name.
            resume_key: what unfinished attempts at it share.
            wait_s: how long to wait for another holder; None waits for ever.
            inputs: fingerprints of the artifacts that are read meanwhile, which `ingot gc` then leaves in place.
        """
        name = f"{stage}-{self.short(resume_key)}"
        with self.hold(name, wait_s=wait_s):
            note = self.root / "leases" / f"{name}{_INPUTS}"
            if inputs:
                with self.registering():
                    artifact.write_text(note, json.dumps(sorted(inputs)))
            try:
                yield
            finally:
                note.unlink(missing_ok=True)

    @contextlib.contextmanager
    def hold(self, name: str, *, wait_s: float | None) -> Iterator[None]:
        """Hold the lease called `<stage>-<short resume key>`."""
        with lock.hold(self.root / "leases" / f"{name}.lock", what=f"stage {name}", wait_s=wait_s):
            yield

    @contextlib.contextmanager
    def registering(self) -> Iterator[None]:
        """Hold the lock under which runs and stages say what they need, and garbage is collected."""
        with lock.hold(self.root / "leases" / "garbage.lock", what="the store, by `ingot gc`,"):
            yield

    def is_free(self, name: str) -> bool:
        """Return whether nobody holds the lease called `<stage>-<short resume key>`."""
        return not lock.is_held(self.root / "leases" / f"{name}.lock")

    def inputs_in_use(self) -> set[str]:
        """Return the fingerprints of the artifacts that stages at work read."""
        used = set[str]()
        for note in self.root.glob(f"leases/*{_INPUTS}"):
            if not self.is_free(note.name.removesuffix(_INPUTS)):
                with contextlib.suppress(FileNotFoundError):  # it has finished meanwhile
                    used.update(json.loads(note.read_text(encoding="utf-8")))
        return used

    def forget(self, folder: Path) -> None:
        """Remove what is kept about the artifact in a folder that is no more."""
        self._verified(folder).unlink(missing_ok=True)

    @staticmethod
    def short(key: str) -> str:
        """Return the part of a fingerprint or resume key that names files."""
        return key[:_KEY_DIGITS]

    def build_folder(self, stage: str, resume_key: str) -> Path:
        """Return an empty folder on the store's file system to build in; the lease must be held.

        What an earlier, killed attempt left there is removed.
        """
        folder = self.root / "artifacts" / stage / f"{BUILDING}{self.short(resume_key)}"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder
