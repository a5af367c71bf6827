"""The store: where artifacts live, found by stage and fingerprint.

.ingot/artifacts/<stage>/<fingerprint>/   published artifacts
.ingot/scratch/<stage>-<resume key>/      what an unfinished stage keeps between attempts (checkpoints)
.ingot/leases/                            who works on what
.ingot/runs/<run id>/                     record and report of each run
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipelines.core import artifact, lock
from pipelines.core.artifact import Artifact
from pipelines.core.errors import IntegrityError

_KEY_DIGITS = 32


class Store:
    """Artifacts in a local folder.

    Args:
        root: the folder; created when first written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def path(self, stage: str, fingerprint: str) -> Path:
        """Return where the artifact with this fingerprint lives or would live."""
        return self.root / "artifacts" / stage / fingerprint[:_KEY_DIGITS]

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """Return the published artifact, or None; a damaged manifest counts as none."""
        try:
            found = artifact.load(self.path(stage, fingerprint))
        except IntegrityError:
            return None
        return found if found.manifest.fingerprint == fingerprint else None

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

    def scratch(self, stage: str, fingerprint: str) -> Path:
        """Return the scratch folder of a stage execution: the same one at every attempt."""
        return self.root / "scratch" / f"{stage}-{fingerprint[:_KEY_DIGITS]}"

    @contextlib.contextmanager
    def lease(self, stage: str, fingerprint: str, *, wait_s: float | None) -> Iterator[None]:
        """Hold the right to build one artifact; see `pipelines.core.lock.hold`."""
        key = f"{stage}-{fingerprint[:_KEY_DIGITS]}"
        with lock.hold(self.root / "leases" / f"{key}.lock", what=f"stage {key}", wait_s=wait_s):
            yield

    def build_folder(self, stage: str, fingerprint: str) -> Path:
        """Return an empty folder on the store's file system to build in; the lease must be held.

        What an earlier, killed attempt left there is removed.
        """
        folder = self.root / "artifacts" / stage / f".building-{fingerprint[:_KEY_DIGITS]}"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder
