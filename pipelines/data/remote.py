"""The DVC remote: where it is, whether it answers, and the prepared corpora that lie beside the corpus in it.

A prepared corpus lies in `ingot/prepare/<fingerprint>/` below the address of the remote, beside DVC's own `files/`,
which `dvc gc` alone looks at. It is reached through DVC, so that whatever DVC reaches (S3, GCS, SSH, a folder) will do,
with the same credentials. Its manifest is written last: what no manifest names is not there.
"""

from __future__ import annotations

import configparser
import contextlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.core.store import Store
from pipelines.data import importing

NO_REMOTE = "`dvc remote add -d NAME URL` names one, for instance s3://bucket/prefix or a folder on a shared disk"
_BUCKETS = ("s3", "gs", "azure")
"""Schemes whose addresses begin with a bucket that may be missing."""
_SECTION = re.compile(r"'?remote \"(.+)\"'?")


@dataclass(frozen=True)
class Remote:
    """What DVC's configuration says of one remote."""

    name: str
    url: str
    folder: Path | None
    """Where it is a folder of this machine."""


def all_of(project: Path) -> dict[str, Remote]:
    """Return the remotes in the configuration of a project, by name."""
    config = _config(project)
    found = {}
    for section in config.sections():
        if (named := _SECTION.fullmatch(section)) and (url := config[section].get("url")):
            # Relative addresses are relative to the folder of the configuration.
            folder = (project / ".dvc" / Path(url).expanduser()).resolve() if "://" not in url else None
            found[named[1]] = Remote(named[1], url, folder)
    return found


def default(project: Path) -> Remote | None:
    """Return the remote that DVC pushes to and pulls from; None where there is none."""
    return all_of(project).get(_config(project).get("core", "remote", fallback=""))


def _config(project: Path) -> configparser.ConfigParser:
    config = configparser.ConfigParser(interpolation=None, strict=False)
    config.read([project / ".dvc" / "config", project / ".dvc" / "config.local"], encoding="utf-8")
    return config


def committed_folder(project: Path) -> Path | None:
    """Return the folder of the default remote where git would commit what is pushed to it, else None."""
    found = default(project)
    if found is None or found.folder is None:
        return None
    place = next(each for each in (found.folder, *found.folder.parents) if each.is_dir())
    inside = _git(place, "rev-parse", "--show-toplevel")
    ignored = _git(place, "check-ignore", "--quiet", str(found.folder / "files"))
    return found.folder if inside and not ignored else None


def _git(folder: Path, *arguments: str) -> bool:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=60).returncode == 0


# ---- through DVC


@contextlib.contextmanager
def reached(project: Path) -> Iterator[tuple[Any, str]]:
    """Give the file system of the default remote and its path there; errors within say what to do.

    Raises:
        ConfigError: there is no remote, no bucket, or no access to it.
        TransientError: it cannot be reached.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        repo = Repo(str(project))
    except DvcException as error:
        raise ConfigError(f"{project}: {error}", hint="`dvc init` makes DVC's files; `ingot new` does so too") from None
    with contextlib.closing(repo):
        try:
            remote = repo.cloud.get_remote()
        except DvcException as error:
            said = next(iter(str(error).splitlines()))
            raise ConfigError(f"the project has no DVC remote: {said}", hint=NO_REMOTE) from None
        found = default(project)
        with importing.explained(found.url if found else remote.path):
            if remote.fs.protocol in _BUCKETS:
                remote.fs.fs.ls(remote.path.split("/")[0])
            yield remote.fs, remote.path


def has(project: Path, md5: str) -> bool:
    """Return whether the remote has an object of DVC's.

    Raises:
        ConfigError, TransientError: see `reached`.
    """
    with reached(project) as (system, root):
        return bool(system.exists(system.join(root, "files", "md5", md5[:2], md5[2:])))


# ---- prepared corpora


def push_prepared(prepared: Artifact, project: Path) -> dict[str, Any]:
    """Put a prepared corpus into the remote, by its fingerprint; one that is there stays.

    Args:
        prepared: the artifact; it is verified first.
        project: the folder with `.dvc`.

    Raises:
        ConfigError, TransientError: see `reached`.
    """
    prepared.verify()
    key, folder = prepared.manifest.fingerprint, prepared.path
    with reached(project) as (system, root):
        place = _place(system, root, key)
        sent = not system.exists(system.join(place, artifact.MANIFEST))
        for name in [*prepared.manifest.files, artifact.MANIFEST] if sent else []:
            target = system.join(place, *name.split("/"))
            system.makedirs(system.parent(target), exist_ok=True)
            system.put_file(str(folder / name), target)
    return {"prepared": key, "bytes": prepared.size, "sent": "all of it" if sent else "it was there"}


def pull_prepared(store: Store, key: str, resume_key: str, project: Path) -> Artifact:
    """Bring a prepared corpus from the remote into a store that is a folder, verified.

    Args:
        store: where it is to be.
        key: fingerprint.
        resume_key: of the same stage, whose lease is held meanwhile: nobody prepares it at the same time.
        project: the folder with `.dvc`.

    Raises:
        ConfigError: the remote does not have it, or see `reached`.
        IntegrityError: what the remote has is damaged.
        TransientError: see `reached`.
    """
    with store.lease("prepare", resume_key, wait_s=None):
        if (there := store.find("prepare", key)) is not None:
            return there
        build = store.build_folder("prepare", resume_key)
        with reached(project) as (system, root):
            place = _place(system, root, key)
            if not system.exists(system.join(place, artifact.MANIFEST)):
                raise ConfigError(
                    f"the DVC remote has no prepared corpus {key[:12]}",
                    hint="`ingot data push --prepared` with the same recipe, data.dvc and version of Ingot sends it; "
                    "or `ingot data pull` and prepare it here",
                )
            system.get_file(system.join(place, artifact.MANIFEST), str(build / artifact.MANIFEST))
            manifest = artifact.load(build).manifest
            for name in manifest.files:
                (build / name).parent.mkdir(parents=True, exist_ok=True)
                system.get_file(system.join(place, *name.split("/")), str(build / name))
        if manifest.fingerprint != key:
            raise IntegrityError(f"{place} holds {manifest.fingerprint[:12]}, not {key[:12]}", hint=_SEND_AGAIN)
        for name, record in manifest.files.items():
            try:
                artifact.verify_file(build / name, record)
            except IntegrityError as error:
                raise IntegrityError(f"in the remote, {place}: {error.message}", hint=_SEND_AGAIN) from None
            artifact.sync(build / name)
        return artifact.commit(build, store.path("prepare", key), manifest)


_SEND_AGAIN = "remove that folder in the remote, then `ingot data push --prepared` where it is whole"


def _place(system: Any, root: str, key: str) -> str:
    return str(system.join(root, "ingot", "prepare", key[:32]))
