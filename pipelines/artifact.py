"""Artifacts: a folder plus `manifest.json`, immutable once published.

The manifest is written last and the folder appears under its final name by one rename, so a reader that finds a
manifest finds everything it names. `digest` is the identity of the *result*: it covers the result files only, never
the observations (timings, logs) that differ between two runs of the same computation.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines import fingerprint
from pipelines.errors import IntegrityError
from pipelines.provenance import Provenance

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


class FileRecord(BaseModel):
    """What the manifest says of one file."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    size: int
    """Bytes."""
    observation: bool = False
    """True for timings and logs: verified like any file, but not part of the artifact's digest."""


class Manifest(BaseModel):
    """The record of an artifact; a folder without a valid one is not an artifact."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    stage: str
    """Stage name, one of prepare, pretrain, compress, evaluate, promote (or `checkpoint`)."""
    node: str
    """Name of the node in the graph, for instance `compress.rtn-int8`."""
    fingerprint: str
    identity: dict[str, Any]
    """What the fingerprint was taken over; `ingot plan` compares it field by field."""
    parents: dict[str, str]
    """Input name -> digest of the artifact that was used."""
    files: dict[str, FileRecord]
    summary: dict[str, Any]
    """Small JSON facts about the result, for tables."""
    provenance: Provenance | None = None

    @property
    def digest(self) -> str:
        """sha256 over the result files: equal digests mean equal results, byte for byte."""
        return fingerprint.digest({name: f.sha256 for name, f in self.files.items() if not f.observation})


@dataclass(frozen=True)
class Artifact:
    """A published artifact: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """Identity of the result; see `Manifest.digest`."""
        return self.manifest.digest

    @property
    def size(self) -> int:
        """Bytes of all payload files."""
        return sum(record.size for record in self.manifest.files.values())

    def read_json(self, name: str) -> Any:
        """Parse one JSON file of the payload."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            IntegrityError: naming the file, the expected and the found sha256.
        """
        for name, record in self.manifest.files.items():
            _verify_file(self.path / name, record)


def publish(
    build: Path,
    final: Path,
    *,
    stage: str,
    node: str,
    identity: Mapping[str, Any],
    parents: Mapping[str, str],
    summary: Mapping[str, Any],
    provenance: Provenance | None = None,
    observations: Collection[str] = (),
) -> Artifact:
    """Turn the folder `build` into the artifact `final`: hash, fsync, manifest last, one atomic rename.

    Args:
        build: folder with the finished payload, on the same file system as `final`.
        final: where the artifact appears; an existing artifact there is replaced.
        stage: stage name.
        node: graph node name.
        identity: what the fingerprint is taken over.
        parents: input name -> digest.
        summary: small JSON facts.
        provenance: who, when and from which code.
        observations: payload files (or folders, ending in `/`) that hold timings or logs, not results.
    """
    files = {}
    for path in sorted(p for p in build.rglob("*") if p.is_file()):
        name = path.relative_to(build).as_posix()
        _sync(path)
        files[name] = FileRecord(
            sha256=fingerprint.hash_file(path), size=path.stat().st_size, observation=_observed(name, observations)
        )
    manifest = Manifest(
        stage=stage,
        node=node,
        fingerprint=fingerprint.digest(identity),
        identity=dict(identity),
        parents=dict(parents),
        files=files,
        summary=dict(summary),
        provenance=provenance,
    )
    write_text(build / MANIFEST, manifest.model_dump_json(indent=1))
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        # A rename cannot replace a filled folder; the old one steps aside first, and a crash here leaves no artifact,
        # which the next run sees as work to do, never as a mixture.
        retired = final.with_name(f".retired-{final.name}-{os.getpid()}")
        final.rename(retired)
        shutil.rmtree(retired)
    build.rename(final)
    _sync(final.parent)
    return Artifact(final, manifest)


def load(path: Path) -> Artifact:
    """Read the artifact at `path`, trusting only its manifest.

    Raises:
        IntegrityError: no manifest, an unreadable one, or one of a newer schema.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise IntegrityError(f"{path} is not an artifact: it has no {MANIFEST}") from None
    try:
        raw = json.loads(text)
        if isinstance(raw, dict) and raw.get("schema_version", 0) > SCHEMA_VERSION:
            raise IntegrityError(
                f"{path / MANIFEST} has schema version {raw['schema_version']}; this checkout reads {SCHEMA_VERSION}",
                hint="update the checkout to the version that wrote it",
            )
        return Artifact(path, Manifest.model_validate(raw))
    except (json.JSONDecodeError, ValidationError) as error:
        raise IntegrityError(
            f"{path / MANIFEST} is damaged: {error}", hint="delete the folder and run again"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one, never a part, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _observed(name: str, observations: Collection[str]) -> bool:
    return any(name == o or (o.endswith("/") and name.startswith(o)) for o in observations)


def _verify_file(path: Path, record: FileRecord) -> None:
    found = fingerprint.hash_file(path) if path.is_file() else "(missing)"
    if found != record.sha256:
        raise IntegrityError(
            f"{path} does not match its manifest: expected sha256 {record.sha256}, found {found}",
            hint="`ingot verify` lists every damaged artifact; delete this one and run again to rebuild it",
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
