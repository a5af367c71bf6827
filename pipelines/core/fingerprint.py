"""Identity: canonical JSON, sha256, and the field-level difference between two identities.

A fingerprint refuses what has no stable JSON form instead of hashing a memory address or a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20
_MISSING = object()


@dataclass(frozen=True)
class Change:
    """One field that differs between two identities; `MISSING` stands for an absent side."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {_show(self.old)} -> {_show(self.new)}"


def canonical_json(value: Any) -> str:
    """Return the one JSON text that stands for `value`: sorted keys, no spaces, ASCII.

    Raises:
        TypeError: if any part of `value` has no stable JSON form; the message names its path.
    """
    _refuse_unstable(value, "")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any) -> str:
    """Return the sha256 (64 hex digits) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the sha256 (64 hex digits) of a file's bytes, read in bounded memory."""
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


def explain(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Return every field that differs, as dotted paths in sorted order."""
    before, after = dict(_flatten(old)) if old else {}, dict(_flatten(new)) if new else {}
    return [
        Change(path, before.get(path, _MISSING), after.get(path, _MISSING))
        for path in sorted(before.keys() | after.keys())
        # As text: 1, 1.0 and True are equal in Python, and three different values in JSON.
        if path not in before or path not in after or canonical_json(before[path]) != canonical_json(after[path])
    ]


def _show(value: Any) -> str:
    return "(absent)" if value is _MISSING else json.dumps(value, ensure_ascii=False)


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, leaf); an empty container is a leaf of its own."""
    items: Iterator[tuple[str, Any]]
    if isinstance(value, Mapping) and value:
        items = ((str(key), child) for key, child in value.items())
    elif isinstance(value, list | tuple) and value:
        items = ((str(index), child) for index, child in enumerate(value))
    else:
        yield path, value
        return
    for key, child in items:
        yield from _flatten(child, f"{path}.{key}" if path else key)


def _refuse_unstable(value: Any, path: str) -> None:
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{path or 'value'} is {value}: a non-finite number has no JSON form")
    elif isinstance(value, Mapping):
        for key, child in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{path or 'value'} has the key {key!r}: JSON keys are strings")
            _refuse_unstable(child, f"{path}.{key}" if path else key)
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            _refuse_unstable(child, f"{path}.{index}" if path else str(index))
    else:
        raise TypeError(f"{path or 'value'} is a {type(value).__name__}, which has no stable JSON form; pass its name")
