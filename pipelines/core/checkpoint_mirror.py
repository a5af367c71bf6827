"""Checkpoints of unfinished work, mirrored to the bucket in the background, so that another machine can go on.

    scratch/<stage>-<resume key>/<folder>/checkpoints/step-00000050/...   files of one checkpoint
                                                      step-00000050/journals/...   what lies beside `checkpoints/`
                                                      step-00000050.json   their hashes, written last

A thread of the stage's own process looks for new checkpoints and sends the newest; training waits for none of it. A
mirrored checkpoint without its record does not exist. Of the records, the newest whose files are what it says wins.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from pydantic import TypeAdapter, ValidationError

from pipelines.core import artifact, fingerprint
from pipelines.core.artifact import FileRecord
from pipelines.core.bucket import Bucket
from pipelines.core.errors import IngotError, IntegrityError, LockLost
from pipelines.core.safe_path import safe_join
from pipelines.core.store import Lease

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
_STEP = re.compile(r"step-\d{8}")
_JOURNALS = "journals"
_KEPT = 2
"""The newest may turn out to be damaged."""
_LOOK_S = 1.0
_LAST_S = 15.0
"""How long the end of an attempt that failed or was stopped waits for the newest checkpoint to be sent."""
_FILES = TypeAdapter(dict[str, FileRecord])


class CheckpointMirror:
    """The checkpoints below one scratch folder.

    Args:
        bucket: where they are mirrored.
        scratch: the folder.
        lease: the right to work in it: nothing is sent without it.
        journals: patterns of files beside a folder `checkpoints` that going on from a checkpoint takes.
    """

    def __init__(self, bucket: Bucket, scratch: Path, lease: Lease, journals: Collection[str]) -> None:
        self._bucket, self._scratch, self._lease, self._journals = bucket, scratch, lease, tuple(journals)
        self._prefix = f"scratch/{scratch.name}/"
        self._sent: dict[Path, str] = {}
        """Folder of checkpoints -> name of the newest that is mirrored."""
        self._stopping, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name=f"mirror {scratch.name}", daemon=True)

    # ---- bringing back -----------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Put the newest valid mirrored checkpoint in its place where this machine has none as new."""
        names = [entry.name for entry in self._bucket.entries(self._prefix)]
        records = [PurePosixPath(name) for name in names if PurePosixPath(name).suffix == ".json"]
        records = [path for path in records if _STEP.fullmatch(path.stem)]
        for parent in sorted({path.parent for path in records}):
            folder = self._scratch / parent.relative_to(self._prefix)
            for record in sorted((path for path in records if path.parent == parent), reverse=True):
                if record.stem <= (_newest(folder) or ""):
                    self._sent[folder] = record.stem
                    break
                try:
                    self._bring(record, folder)
                except (IntegrityError, FileNotFoundError, ValidationError) as error:
                    log.warning("%s cannot be used: %s", self._bucket.place(str(record)), str(error).splitlines()[0])
                    continue
                log.warning("going on from %s of the store", record.stem)
                self._sent[folder] = record.stem
                break

    def _bring(self, record: PurePosixPath, folder: Path) -> None:
        """Download and verify one checkpoint, then its journals; it appears by one rename."""
        there = self._bucket.read(str(record))
        files = _FILES.validate_json("null" if there is None else there.text)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".restoring-", dir=folder) as temporary:
            place = Path(temporary) / record.stem
            paths = {name: safe_join(place, name, said_by=self._bucket.place(str(record))) for name in files}
            for path in paths.values():
                path.parent.mkdir(parents=True, exist_ok=True)
            self._bucket.download({f"{record.with_suffix('')}/{name}": path for name, path in paths.items()})
            for name, file in files.items():
                artifact.verify_file(paths[name], file)
                artifact.sync(paths[name])
            journals = place / _JOURNALS
            for path in journals.iterdir() if journals.is_dir() else ():
                path.replace(folder.parent / path.name)
            shutil.rmtree(journals, ignore_errors=True)
            shutil.rmtree(folder / record.stem, ignore_errors=True)
            place.rename(folder / record.stem)

    # ---- sending -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to look for checkpoints."""
        self._thread.start()

    def stop(self, *, finish: bool) -> None:
        """Stop looking; with `finish`, send what is not mirrored yet, and say what could not be.

        Without, nothing is sent any more when this returns: the scratch may be cleared.
        """
        self._over = not finish
        self._stopping.set()
        self._thread.join(_LAST_S if finish else None)
        if not finish:
            return
        for folder, name in self._pending():
            log.warning(
                "%s is not in the store yet, newest there: %s; it is only on this machine, in %s",
                name, self._sent.get(folder, "none"), folder,
            )  # fmt: skip

    def _work(self) -> None:
        last = False
        while not last:
            last = self._stopping.wait(_LOOK_S)
            for folder, name in () if self._over else self._pending():
                try:
                    self._send(folder, name)
                except LockLost:
                    return
                except FileNotFoundError:
                    continue  # it was pruned meanwhile: there is a newer one
                except (IngotError, OSError) as error:
                    log.warning("%s could not be mirrored: %s", name, str(error).splitlines()[0])

    def _pending(self) -> Iterator[tuple[Path, str]]:
        """Yield the newest checkpoint of every folder where it is not mirrored."""
        for folder in sorted(self._scratch.glob(f"**/{CHECKPOINTS}")):
            name = _newest(folder)
            if name is not None and name != self._sent.get(folder):
                yield folder, name

    def _send(self, folder: Path, name: str) -> None:
        """Upload one checkpoint with the journals that belong to it, and its record last; then remove older ones."""
        manifest = artifact.load(folder / name).manifest
        parent = self._prefix + folder.relative_to(self._scratch).as_posix()
        with tempfile.TemporaryDirectory(prefix="ingot-journals-") as temporary:
            paths = {file: folder / name / file for file in (*manifest.files, artifact.MANIFEST)}
            # Journals grow meanwhile: what is sent is what is hashed.
            for source in {path for pattern in self._journals for path in folder.parent.glob(pattern)}:
                paths[f"{_JOURNALS}/{source.name}"] = Path(shutil.copy(source, temporary))
            files = {file: manifest.files.get(file) or _record(path) for file, path in paths.items()}
            self._bucket.upload({f"{parent}/{name}/{file}": path for file, path in paths.items()})
        self._lease.check()
        record = json.dumps({file: each.model_dump() for file, each in files.items()})
        self._bucket.write(f"{parent}/{name}.json", record)
        self._sent[folder] = name
        self._prune(parent)

    def _prune(self, parent: str) -> None:
        """Remove all but the newest: first their records, so that no half-deleted one counts."""
        names = [entry.name for entry in self._bucket.entries(f"{parent}/")]
        records = sorted(n for n in names if _STEP.fullmatch(PurePosixPath(n).stem) and n.endswith(".json"))
        old = records[:-_KEPT]
        self._bucket.delete(*old)
        self._bucket.delete(*(n for n in names if any(n.startswith(r.removesuffix(".json") + "/") for r in old)))


def _record(path: Path) -> FileRecord:
    return FileRecord(sha256=fingerprint.hash_file(path), size=path.stat().st_size)


def _newest(folder: Path) -> str | None:
    """Return the name of the newest published checkpoint in a folder; by name, as clocks and mtimes may lie."""
    found = [path.name for path in folder.glob("step-*") if _STEP.fullmatch(path.name)]
    return max((name for name in found if (folder / name / artifact.MANIFEST).is_file()), default=None)
