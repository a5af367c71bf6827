"""The DVC cache of a project: what of it no version of the corpus needs, and whether the work tree is a second copy."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path
from typing import Any

from pipelines.core import disk
from pipelines.core.errors import ConfigError
from pipelines.data import dvc, versioning
from pipelines.data.config import DataConfig

KEEPS = {
    "commits": ("--all-commits",),
    "branches": ("--workspace", "--all-branches", "--all-tags"),
    "tags": ("--workspace", "--all-tags"),
    "work-tree": ("--workspace",),
}
"""What `gc` leaves in the cache -> DVC's options for it; the work tree's version stays always."""
LINKS = "reflink,hardlink,copy"
_REMOVING = re.compile(r"^Removing (.+)$", re.MULTILINE)
_LEFT_OVER = ("ingot-import", "ingot-diff", "ingot-fresh")
"""Folders below `.dvc/tmp` of commands that were killed; an import would go on from the first."""


def unused(project: Path, keep: str) -> dict[str, int]:
    """Return how many objects, and bytes, `gc` would remove; the remote is never touched.

    Args:
        project: the folder with `.dvc`.
        keep: a key of `KEEPS`.

    Raises:
        ConfigError: there is no such choice, or it needs git and there is none.
    """
    said = dvc.run(project, "gc", "--dry", "--force", *_options(project, keep))
    objects = [Path(place) for place in _REMOVING.findall(said)]
    tmp = [project / ".dvc" / "tmp" / name for name in _LEFT_OVER]
    left = [folder for folder in tmp if folder.exists()]
    return {
        "objects": len(objects),
        "folders": len(left),
        "bytes": sum(place.stat().st_size for place in objects) + sum(map(disk.size_of, left)),
    }


def collect(project: Path, keep: str) -> None:
    """Remove from the cache what is not kept; see `unused`."""
    dvc.run(project, "gc", "--force", *_options(project, keep))
    for name in _LEFT_OVER:
        shutil.rmtree(project / ".dvc" / "tmp" / name, ignore_errors=True)


def _options(project: Path, keep: str) -> tuple[str, ...]:
    if keep not in KEEPS:
        raise ConfigError(f"--keep {keep}: there is no such choice", hint=f"valid: {', '.join(KEEPS)}")
    if keep != "work-tree" and versioning.git(project, "rev-parse", "--git-dir").returncode:
        raise ConfigError(
            f"{project} is no git repository: no version but that of the work tree is known",
            hint="--keep work-tree keeps that one alone",
        )
    return KEEPS[keep]


# ---- links


def link_types(project: Path) -> tuple[list[str], list[str]]:
    """Return the ways in which DVC would put files from its cache into the work tree, and those that the disk can.

    Raises:
        ConfigError: the project has no `.dvc`.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc_objects.fs import generic

    try:
        repo = Repo(str(project))
    except DvcException as error:
        raise ConfigError(f"{project}: {error}", hint="`dvc init` makes DVC's files") from None
    with contextlib.closing(repo):
        objects = repo.cache.local
        # The place that is tried lies beside the path that is given.
        beside = str(project / ".dvc" / "tmp" / "try")
        able = generic.test_links(["reflink", "hardlink"], objects.fs, objects.path, repo.fs, beside)
        return list(objects.cache_types), able


def takes_twice(project: Path) -> bool:
    """Return whether the corpus lies on the disk twice, in the work tree and in the cache, and need not."""
    wanted, able = link_types(project)
    used = next((each for each in wanted if each in {*able, "symlink", "copy"}), "copy")
    return used == "copy" and bool(able)


def link(config: DataConfig, project: Path) -> dict[str, Any]:
    """Let DVC link the work tree to its cache from now on, and link what is here already.

    Linked files are read-only: to edit one in place, `dvc unprotect` it first. Replacing a file needs nothing.

    Raises:
        ConfigError: the disk can do neither, or the corpus is not recorded.
        IntegrityError: the corpus is not the recorded one.
    """
    _, able = link_types(project)
    if not able:
        raise ConfigError(
            f"the disk of {project} and its DVC cache can neither share nor link files",
            hint="`dvc cache dir PLACE` puts the cache on the disk of the project",
        )
    if (project / config.path).exists():
        versioning.verify(config, project)
    dvc.run(project, "config", "cache.type", LINKS)
    if (project / config.path).exists():
        dvc.run(project, "checkout", "--relink", config.tracked_by)
    return {"cache": able[0], "files": "read-only; `dvc unprotect` before one is edited in place"}
