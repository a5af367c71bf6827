"""What a store can do without, and its removal, safe beside runs at work.

Folders of unfinished work (scratch, `.building-*`) belong to whoever has the lease of their stage execution: only those
whose lease is free are garbage. Artifacts that a stage at work reads are named in its lease (see `Store.lease`). Both
runs and leases register under the same lock that a collection holds, so nothing starts between looking and removing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.core import artifact, disk
from pipelines.core.errors import LockedError
from pipelines.core.store import BUILDING, Store

FETCHED = "fetched-"
"""Beginning of the name of a folder below scratch/ that something of the registry is downloaded into."""
_FETCH_S = 24 * 3600.0


@dataclass(frozen=True)
class Garbage:
    """One folder that nothing needs."""

    kind: str
    """artifact, scratch, building (of an attempt that was killed) or retired (an artifact that was replaced)."""
    stage: str
    name: str
    path: Path
    bytes: int
    lease: str | None = None
    """Stage and resume key whose lease must be free while it is removed."""


def find(
    store: Store, wanted: Collection[str], resumable: Collection[str], *, alone: Collection[str] = ()
) -> list[Garbage]:
    """Return what can be removed, artifacts first.

    Args:
        store: where to look.
        wanted: fingerprints of artifacts that are needed; what they descend from is needed too.
        resumable: resume keys of unfinished work to keep.
        alone: fingerprints of artifacts that are needed, and not for what they descend from.
    """
    stored = {each.manifest.fingerprint: each for each in store.artifacts()}
    needed, pending = set[str](), [*wanted, *store.inputs_in_use()]
    while pending:
        key = pending.pop()
        if key not in needed:
            needed.add(key)
            inputs: dict[str, Any] = stored[key].manifest.identity.get("inputs", {}) if key in stored else {}
            pending += inputs.values()
    garbage = [
        Garbage("artifact", each.manifest.stage, each.manifest.node, each.path, disk.size_of(each.path))
        for key, each in stored.items()
        if key not in needed and key not in alone
    ]
    kept = {store.short(key) for key in resumable}
    for folder in sorted(store.root.glob("scratch/*-*")):
        stage, _, key = folder.name.rpartition("-")
        if key not in kept and store.is_free(folder.name) and not _is_being_fetched(folder):
            garbage.append(Garbage("scratch", stage, stage, folder, disk.size_of(folder), folder.name))
    for folder in sorted(store.root.glob(f"artifacts/*/{BUILDING}*")):
        lease = f"{folder.parent.name}-{folder.name.removeprefix(BUILDING)}"
        if store.is_free(lease):
            garbage.append(
                Garbage("building", folder.parent.name, folder.parent.name, folder, disk.size_of(folder), lease)
            )
    # Whoever retired an artifact has no further use for it, also if it was killed before its successor appeared.
    retired = sorted(store.root.glob(f"artifacts/*/{artifact.RETIRED}*"))
    return garbage + [
        Garbage("retired", folder.parent.name, folder.parent.name, folder, disk.size_of(folder)) for folder in retired
    ]


def _is_being_fetched(folder: Path) -> bool:
    """Tell whether a folder is a download from the registry, which has no lease, and began within a day."""
    return folder.name.startswith(FETCHED) and time.time() - folder.stat().st_mtime < _FETCH_S


def remove(store: Store, garbage: Collection[Garbage]) -> Iterator[Garbage]:
    """Remove folders and yield those that are gone; one that somebody works on by now stays."""
    for each in garbage:
        with contextlib.suppress(LockedError), contextlib.ExitStack() as stack:
            if each.lease is not None:
                stack.enter_context(store.hold(each.lease, wait_s=0))
            path = each.path
            if each.kind == "artifact":
                # One rename, so that a reader never sees an artifact that lacks files.
                path = path.with_name(f"{artifact.RETIRED}{path.name}-{os.getpid()}")
                each.path.rename(path)
                store.forget(each.path)
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                yield each
