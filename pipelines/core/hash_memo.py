"""Hashes of files that were computed before, valid as long as the file system says that the file is the same.

A file is taken for unchanged while its size, inode, modification time and status-change time are. The last one moves
also when a tool puts the modification time back. A file that changed within the clock's grain of being hashed is not
remembered, so a second change in that grain is not missed. What the file system does not notice (a bit that flips on
the disk) this cannot notice either: `ingot verify` hashes every byte.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.core.artifact import write_text

_GRAIN_NS = 2 * 10**9
"""Coarsest time stamps of file systems in use."""


class HashMemo:
    """Hashes of the files of one folder, kept in a JSON file.

    Args:
        record: the JSON file; one that is missing or damaged counts as empty.
        hash_file: computes the hash of a file that is not known.
        max_age_s: how long a hash is believed; None means for ever.
    """

    def __init__(self, record: Path, hash_file: Callable[[Path], str], *, max_age_s: float | None = None) -> None:
        self._record, self._hash_file = record, hash_file
        self._known: dict[str, dict[str, Any]] = {}
        self._changed = False
        oldest = 0.0 if max_age_s is None else time.time() - max_age_s
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            stored = json.loads(record.read_text(encoding="utf-8"))
            self._known = {path: entry for path, entry in stored.items() if entry["hashed_at"] >= oldest}

    def hash(self, path: Path) -> str:
        """Return the hash of a file, reading it only where it is not known or has changed."""
        entry = self._known.get(str(path))
        before = _identity(path)
        if entry is not None and entry["identity"] == before:
            return str(entry["hash"])
        started = time.time_ns()
        digest = self._hash_file(path)
        self._changed = True
        if _identity(path) == before and started - max(before["mtime_ns"], before["ctime_ns"]) > _GRAIN_NS:
            self._known[str(path)] = {"identity": before, "hash": digest, "hashed_at": started / 10**9}
        else:
            self._known.pop(str(path), None)
        return digest

    def save(self) -> None:
        """Keep what was learned; without a place to write it to, it is learned again."""
        if self._changed:
            with contextlib.suppress(OSError):
                self._record.parent.mkdir(parents=True, exist_ok=True)
                write_text(self._record, json.dumps(self._known))


def _identity(path: Path) -> dict[str, int]:
    status = path.stat()
    return {
        "size": status.st_size,
        "inode": status.st_ino,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }
