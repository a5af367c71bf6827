"""add, import, update: how files become the recorded corpus, and how a later state of its source takes their place.

Where a corpus was imported from stands in its DVC file, under `meta: ingot: source`, which DVC keeps. A path is
relative to the project. An address with a secret in it is not kept.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.core import artifact
from pipelines.core.errors import ConfigError
from pipelines.core.redaction import redact
from pipelines.data import corpus_files, dvc, importing, reader, versioning
from pipelines.data.config import DataConfig, PrepareConfig

_ARRIVING = Path(".dvc/tmp/ingot-import")
"""Where an import puts what has arrived, below the project."""
_NAMED = 5
"""Files that a message names when there are more."""


def add(config: DataConfig, project: Path, source: str | None = None) -> dict[str, Any]:
    """Record the corpus in the work tree as a new version: writes data.dvc, which is then committed to git.

    Args:
        config: which corpus.
        project: the folder with `.dvc`.
        source: where it was imported from; None keeps what is known of that.

    Raises:
        ConfigError: there is nothing, or it is a link, which DVC does not record; data.dvc is in conflict.
        IntegrityError: links within, which DVC would leave out.
    """
    path = project / config.path
    versioning.refuse_link(path)
    if not path.exists():
        raise ConfigError(f"{path} does not exist", hint="put texts there first, or `ingot data import` them")
    corpus_files.files(path, project)
    before = _recorded(config, project)
    dvc.run(project, "add", config.path)
    if source is not None:
        _keep_source(config, project, source)
    return _recording(config, project, before)


def import_url(config: DataConfig, project: Path, url: str) -> dict[str, Any]:
    """Bring a corpus from a path or a URL and record it; the one that is here must be moved away first.

    Raises:
        ConfigError: a corpus is here already, there is nothing at the address, or nothing that can be read.
        TransientError: the network or the server failed.
    """
    path = project / config.path
    if path.exists() or path.is_symlink():
        raise ConfigError(
            f"{path} exists and would be replaced",
            hint=f"`ingot new NAME --data {url}` makes a project of its own for it; or move this one away first",
        )
    taken = importing.bring(url, path, project / _ARRIVING)
    if path.suffix:
        _become_file(path)
    return {"taken": "; ".join(importing.summary(taken)), **add(config, project, url)}


def update(config: DataConfig, project: Path, *, force: bool = False) -> dict[str, Any]:
    """Bring the corpus anew from where it was imported from, and record it.

    Args:
        config: which corpus.
        project: the folder with `.dvc`.
        force: also where files that are here differ from the recorded ones, and would be lost.

    Raises:
        ConfigError: no source is recorded, or it is gone.
        IntegrityError: files here were edited.
        TransientError: the network or the server failed.
    """
    path, before = project / config.path, _recorded(config, project)
    source = _source(config, project)
    if path.exists() and not force:
        versioning.verify(config, project)
    if source is None:  # imported by DVC itself, which keeps the source in a way of its own
        dvc.run(project, "update", config.tracked_by)
        return _recording(config, project, before)
    fresh = project / ".dvc" / "tmp" / "ingot-fresh"
    _remove(fresh)
    taken = importing.bring(source, fresh, project / _ARRIVING)
    if path.is_file() and not _become_file(fresh):
        raise ConfigError(
            f"{path} is a file, and {redact(source)} holds several now",
            hint="data.path=FOLDER names a folder for them: `ingot data import` takes them in",
        )
    _remove(path)
    fresh.rename(path)
    dvc.run(project, "add", config.path)
    return {
        "source": redact(source),
        "taken": "; ".join(importing.summary(taken)),
        **_recording(config, project, before),
    }


def _become_file(path: Path) -> bool:
    """Put the only file of a folder in the folder's place; return whether there was only one."""
    files = [each for each in path.rglob("*") if each.is_file()]
    if len(files) == 1:
        single = path.with_name(f".{path.name}.single")
        files[0].rename(single)
        shutil.rmtree(path)
        single.rename(path)
    return len(files) == 1


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- where it came from


def _keep_source(config: DataConfig, project: Path, source: str) -> None:
    record = project / config.tracked_by
    stage = yaml.safe_load(record.read_text(encoding="utf-8"))
    if redact(source) != source:
        return
    kept = source if "://" in source else os.path.relpath(Path(source).expanduser(), project)
    stage["meta"] = {**(stage.get("meta") or {}), "ingot": {"source": kept}}
    artifact.write_text(record, yaml.safe_dump(stage, sort_keys=False, allow_unicode=True))


def _source(config: DataConfig, project: Path) -> str | None:
    """Return where a corpus was imported from; None where DVC imported it.

    Raises:
        ConfigError: nobody imported it.
    """
    versioning.data_hash(config, project)
    stage = yaml.safe_load((project / config.tracked_by).read_text(encoding="utf-8"))
    try:
        source = str(stage["meta"]["ingot"]["source"])
    except (KeyError, TypeError):
        if stage.get("deps"):
            return None
        raise ConfigError(
            f"{config.tracked_by} names no source to update from",
            hint="change the files and `ingot data add`; `ingot data import SOURCE` records where a corpus came from",
        ) from None
    return source if "://" in source else os.path.normpath(project / source)


# ---- what is said of it


def _recorded(config: DataConfig, project: Path) -> dict[str, str]:
    """Return relative path -> md5 of what data.dvc names now, as far as that is known here."""
    if not (project / config.tracked_by).exists():
        return {}
    md5 = versioning.data_hash(config, project)
    if not md5.endswith(".dir"):
        return {Path(config.path).name: md5}
    return versioning.listing_of(md5, project) or {}


def _recording(config: DataConfig, project: Path, before: Mapping[str, str]) -> dict[str, Any]:
    """Say what the corpus consists of now: nothing joins an older corpus, or is passed over, in silence."""
    tracked, after = versioning.tracked(config, project), _recorded(config, project)
    groups = {
        "added": [name for name in after if name not in before],
        "changed": [name for name in after if name in before and after[name] != before[name]],
        "kept": [name for name in after if after[name] == before.get(name)],
        "removed": [name for name in before if name not in after],
        "not read": _unread(project / config.path, list(after)),
    }
    return {
        "hash": tracked["md5"],
        "bytes": tracked["size"],
        "files": tracked["nfiles"],
        **{group: _some(names) for group, names in groups.items() if names},
        "next": f"git add {config.tracked_by} && git commit; then `ingot data push`",
    }


def _unread(path: Path, names: list[str]) -> list[str]:
    """Return the files that no run reads, each with what it is."""
    names = names if path.is_dir() else [path.name]
    return list(map(str, reader.inspect(path, names, PrepareConfig(), records_too=False).unread))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(sorted(names)[:_NAMED]) + more
