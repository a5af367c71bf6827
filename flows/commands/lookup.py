"""Find a run or an artifact by what a user types: an id, the beginning of a fingerprint, a node name."""

from __future__ import annotations

import difflib
from pathlib import Path

from flows.config import StoreConfig
from flows.run_record import RunRecord, Runs
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.core.provenance import CHECKOUT
from pipelines.core.store import Store

_MIN_DIGITS = 6


def store() -> Store:
    """Return the checkout's default store."""
    return Store(CHECKOUT / StoreConfig().path)


def find_artifact(target: str) -> Artifact | None:
    """Return the artifact with this node name in the newest run, this path, or this beginning of a fingerprint."""
    for run in reversed(Runs(store().root).all()):
        node = run.nodes.get(target)
        if node is not None and node.artifact is not None and Path(node.artifact).is_dir():
            return artifact.load(Path(node.artifact))
    if (Path(target) / artifact.MANIFEST).is_file():
        return artifact.load(Path(target))
    if len(target) < _MIN_DIGITS:
        return None
    found = [a for a in store().artifacts() if a.manifest.fingerprint.startswith(target) or a.digest.startswith(target)]
    return found[-1] if found else None


def find(target: str) -> RunRecord | Artifact:
    """Return the run or the artifact that `target` names.

    Raises:
        ConfigError: nothing has that name (the message offers the nearest), or several runs begin so.
    """
    runs = Runs(store().root)
    if runs.named(target):
        return runs.get(target)
    found = find_artifact(target)
    if found is not None:
        return found
    names = {run.id for run in runs.all()} | {name for run in runs.all() for name in run.nodes}
    near = difflib.get_close_matches(target, sorted(names), n=1)
    raise ConfigError(
        f"nothing here is called {target!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
        hint="`ingot list runs` and `ingot list artifacts` show what there is",
    )
