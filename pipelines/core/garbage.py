"""What a store can do without, and its removal, safe beside runs at work.

Folders of unfinished work (scratch, `.building-*`) belong to whoever has the lease of their stage execution: only those
whose lease is free are garbage. Artifacts that a stage at work reads are named in its lease (see `Store.lease`). Both
runs and leases register under the same lock that a collection holds, so nothing starts between looking and removing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.core import artifact, disk
from pipelines.core.errors import LockedError
from pipelines.core.store import BUILDING, Store, short

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
    """Its folder below `Store.root`, or where that would be."""
    bytes: int
    lease: str | None = None
    """Lock that must be free while it is removed."""
    fingerprint: str = ""
    """Of an artifact."""


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
        Garbage(
            "artifact",
            each.manifest.stage,
            each.manifest.node,
            each.folder,
            store.size_of(each.folder),
            fingerprint=key,
        )
        for key, each in stored.items()
        if key not in needed and key not in alone
    ]
    return [*garbage, *_unfinished(store, {short(key) for key in resumable}), *_of_publishing(store)]


def _unfinished(store: Store, kept: set[str]) -> Iterator[Garbage]:
    """Yield what attempts left that nobody works on and nobody will go on with."""
    for folder in store.scratches():
        stage, _, key = folder.name.rpartition("-")
        lease = f"leases/{folder.name}"
        if key not in kept and not _is_being_fetched(folder) and store.is_free(lease):
            yield Garbage("scratch", stage, stage, folder, store.size_of(folder), lease)
    for folder in sorted(store.root.glob(f"artifacts/*/{BUILDING}*")):
        stage = folder.parent.name
        lease = f"leases/{stage}-{folder.name.removeprefix(BUILDING)}"
        if store.is_free(lease):
            yield Garbage("building", stage, stage, folder, disk.size_of(folder), lease)


def _of_publishing(store: Store) -> Iterator[Garbage]:
    """Yield what is left of artifacts that were replaced, or never came to be."""
    # Whoever retired an artifact has no further use for it, also if it was killed before its successor appeared.
    for folder in [*sorted(store.root.glob(f"artifacts/*/{artifact.RETIRED}*")), *store.leftovers()]:
        stage = folder.relative_to(store.root / "artifacts").parts[0]
        yield Garbage("retired", stage, stage, folder, store.size_of(folder))


def _is_being_fetched(folder: Path) -> bool:
    """Tell whether a folder is a download from the registry, which has no lease, and began within a day."""
    return folder.name.startswith(FETCHED) and time.time() - folder.stat().st_mtime < _FETCH_S


def remove(store: Store, garbage: Collection[Garbage]) -> Iterator[Garbage]:
    """Remove folders and yield those that are gone; one that somebody works on by now stays."""
    for each in garbage:
        with contextlib.suppress(LockedError), contextlib.ExitStack() as stack:
            if each.lease is not None:
                stack.enter_context(store.hold(each.lease, what=each.lease, wait_s=0))
            if each.kind == "artifact":
                store.withdraw(each.stage, each.fingerprint)
            if store.discard(each.path):
                yield each
