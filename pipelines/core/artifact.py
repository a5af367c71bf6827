"""Artifacts: a folder plus `manifest.json`, immutable once published.

The manifest is written last and the folder appears under its final name by one rename, so a reader that finds a
manifest finds everything it names. `digest` is the identity of the *result*: it covers the result files only, never
the observations (timings, logs) that differ between two runs of the same computation.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from pipelines.core import fingerprint
from pipelines.core.errors import IntegrityError
from pipelines.core.fault_injection import fault_point
from pipelines.core.provenance import Provenance
from pipelines.core.safe_path import safe_join

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1

RETIRED = ".retired-"
"""Beginning of the name of an artifact that was replaced or is being removed."""
_REBUILD = "delete the folder and run again to rebuild it"


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
    seal: str = ""
    """sha256 over everything above, as it is on disk: a flipped bit in the manifest itself does not pass either."""

    @property
    def digest(self) -> str:
        """sha256 over the result files: equal digests mean equal results, byte for byte."""
        return fingerprint.digest({name: f.sha256 for name, f in self.files.items() if not f.observation})


class Source(Protocol):
    """Where the files of an artifact come from that are not on this machine yet."""

    def place(self, artifact: Artifact) -> str:
        """Return the address of the artifact."""

    def bring(self, artifact: Artifact) -> None:
        """Have all files in the folder of the artifact, verified."""

    def verify(self, artifact: Artifact) -> None:
        """Hash every file where it comes from, whatever is in the folder."""


@dataclass(frozen=True)
class Artifact:
    """A published artifact: its folder and its manifest."""

    folder: Path
    """Where its files are; of one on an object store, where they will be once `path` was asked for."""
    manifest: Manifest
    source: Source | None = field(default=None, compare=False, repr=False)
    """Of an artifact on an object store."""

    @property
    def path(self) -> Path:
        """Its folder, with all files in it: those of an object store are brought here first, and verified."""
        if self.source is not None:
            self.source.bring(self)
        return self.folder

    @property
    def place(self) -> str:
        """Where it is, for people: nothing is brought here."""
        return str(self.folder) if self.source is None else self.source.place(self)

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
        return read_json(self.path / name)

    def verify(self) -> None:
        """Hash every file again, whatever is known of it; readers inside a run use `Store.verify`.

        Raises:
            IntegrityError: naming the file, the expected and the actual sha256.
        """
        if self.source is not None:
            self.source.verify(self)
            return
        for name, record in self.manifest.files.items():
            verify_file(self.folder / name, record)


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
    for stale in (build / MANIFEST, *build.glob(f".{MANIFEST}.*.tmp")):
        stale.unlink(missing_ok=True)  # of an attempt that was killed here
    files = {}
    for path in sorted(p for p in build.rglob("*") if p.is_file()):
        name = path.relative_to(build).as_posix()
        _let_read(path, build)
        sync(path)
        files[name] = FileRecord(
            sha256=fingerprint.hash_file(path), size=path.stat().st_size, observation=_observed(name, observations)
        )
    for folder in (p for p in build.rglob("*") if p.is_dir()):
        sync(folder)
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
    return commit(build, final, manifest)


def _let_read(path: Path, build: Path) -> None:
    """Give a file the permissions that its folder has by the umask: safetensors writes files for their owner alone."""
    mode, wanted = path.stat().st_mode, build.stat().st_mode & 0o666
    if mode & wanted != wanted:
        path.chmod(stat.S_IMODE(mode) | wanted)


def commit(build: Path, final: Path, manifest: Manifest) -> Artifact:
    """Publish the folder `build`, whose files are synced and described by `manifest`: manifest last, one rename.

    `build` and `final` lie on the same file system; an existing artifact at `final` is replaced.
    """
    fault_point("artifact.before_manifest", path=build)
    manifest = manifest.model_copy(update={"seal": _seal(json.loads(manifest.model_dump_json()))})
    write_text(build / MANIFEST, manifest.model_dump_json(indent=1))
    fault_point("artifact.after_manifest", path=build)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        # A rename cannot replace a filled folder; the old one steps aside first, and a crash here leaves no artifact,
        # which the next run sees as work to do, never as a mixture.
        final.rename(final.with_name(f"{RETIRED}{final.name}-{os.getpid()}"))
        fault_point("artifact.mid_swap", path=build)
    build.rename(final)
    sync(final.parent)
    fault_point("artifact.after_rename", path=final)
    for retired in final.parent.glob(f"{RETIRED}{final.name}-*"):
        shutil.rmtree(retired, ignore_errors=True)  # `ingot gc` may remove it at the same moment
    return Artifact(final, manifest)


def load(path: Path) -> Artifact:
    """Read the artifact at `path`, trusting only its manifest.

    Raises:
        IntegrityError: no manifest, an unreadable one, or one of a newer schema.
    """
    try:
        text = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise IntegrityError(f"{path} is not an artifact: it has no {MANIFEST}") from None
    except OSError as error:
        raise IntegrityError(f"{path / MANIFEST} is damaged: {error}", hint=_REBUILD) from error
    return Artifact(path, parse(text, str(path / MANIFEST)))


def parse(text: bytes | str, place: str) -> Manifest:
    """Return the manifest that a text is; `place` is where it was read, for messages.

    Raises:
        IntegrityError: it is damaged, or of a newer schema.
    """
    try:
        raw = json.loads(text, parse_float=_float_as_written)
        version = raw["schema_version"]
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise IntegrityError(
                f"{place} has schema version {version}; this checkout reads {SCHEMA_VERSION}",
                hint="update the checkout to the version that wrote it",
            )
        manifest = Manifest.model_validate(raw)
        seal = _seal(raw)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{place} is damaged: {error}", hint=_REBUILD) from error
    if seal != manifest.seal:
        raise IntegrityError(
            f"{place} is damaged: its seal is {manifest.seal}, its content gives {seal}", hint=_REBUILD
        )
    for name in manifest.files:  # a manifest may come from elsewhere
        safe_join(Path(place).parent, name, said_by=place)
    return manifest


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        IntegrityError: naming the file that is cut short, or no JSON at all.
        FileNotFoundError: there is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise IntegrityError(
            f"{path} is damaged, it is no whole JSON: {reason}",
            hint="put a whole copy in its place; in the store, delete its artifact and run again",
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one, never a part, also after a power cut."""
    replace_text(path, text)
    sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """`write_text` without forcing the folder's names on to the disk: a power cut may bring the old text back.

    Nothing is touched after the new text can be seen, so a reader may move the folder as soon as it sees it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fault_point("artifact.after_replace", path=path)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, on to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _seal(raw: Mapping[str, Any]) -> str:
    return fingerprint.digest({name: value for name, value in raw.items() if name != "seal"})


def _float_as_written(text: str) -> float:
    """Parse a number, and refuse any spelling but those of pydantic, which writes manifests, and of Python.

    `1e-7` and `1E-7` are one number and one flipped bit apart: the seal, taken over numbers, would not see it.
    """
    value = float(text)
    if text not in (to_json(value).decode(), repr(value)):
        raise ValueError(f"the number {text} is not written as a manifest writes it")
    return value


def _observed(name: str, observations: Collection[str]) -> bool:
    return any(name == o or (o.endswith("/") and name.startswith(o)) for o in observations)


def verify_file(path: Path, record: FileRecord, hash_file: Callable[[Path], str] = fingerprint.hash_file) -> None:
    """Compare the hash of one file with its record.

    Raises:
        IntegrityError: naming the file, the expected and the actual sha256.
    """
    actual = hash_file(path) if path.is_file() else "(missing)"
    if actual != record.sha256:
        raise IntegrityError(
            f"{path} does not match its manifest: expected sha256 {record.sha256}, found {actual}",
            hint="`ingot verify` lists every damaged artifact; delete this one and run again to rebuild it",
        )
