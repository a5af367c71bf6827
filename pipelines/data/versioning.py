"""Which corpus a run uses, proved by hash. DVC versions the data; this module reads what DVC wrote.

`data.dvc` names the corpus by one hash: the md5 of a file, or, for a folder, of a JSON list of the md5 and path of
every file in it. Reading that needs no DVC, so a plan knows the hash in milliseconds. DVC itself runs when files have
to move.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import posixpath
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.core.errors import ConfigError, IntegrityError, TransientError
from pipelines.core.hash_memo import HashMemo
from pipelines.data import corpus_files, dvc, remote
from pipelines.data.config import DataConfig

log = logging.getLogger(__name__)

_REPAIR = "`ingot data pull --force` restores the recorded corpus; `ingot data add` records this one as a new version"
_NAMED = 5
"""Files that a message names when more are wrong."""
_CHUNK_BYTES = 1 << 20
_DIRECTORY = ".dir"
_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
"""DVC's suffix of the hash of a folder."""


@dataclass(frozen=True)
class Corpus:
    """Verified files of one version of the corpus."""

    path: Path
    """A folder, or one file."""
    hash: str
    """DVC hash."""
    md5: dict[str, str]
    """Name relative to `path` -> md5; a reader checks it again, against changes after the verification."""


# ---- what data.dvc says


def data_hash(config: DataConfig, project: Path) -> str:
    """Return the DVC hash of the configured corpus, at `config.rev` when that is set. Reads no data.

    Raises:
        ConfigError: no such revision, no DVC file, or one that does not track `config.path`.
    """
    return str(tracked(config, project)["md5"])


def tracked_bytes(config: DataConfig, project: Path) -> int | None:
    """Return the size of the configured corpus as DVC tracks it; None where the DVC file does not say."""
    size = tracked(config, project)["size"]
    return size if isinstance(size, int) else None


def tracked(config: DataConfig, project: Path) -> dict[str, Any]:
    """Return the entry of data.dvc for the corpus: md5, size, nfiles; see `data_hash`."""
    text = _dvc_file(config, project)
    where = config.tracked_by + (f" at {config.rev}" if config.rev else "")
    try:
        stage = yaml.safe_load(text)
        folder = posixpath.join(posixpath.dirname(config.tracked_by), stage.get("wdir", ""))
        outs = [out for out in stage["outs"] if posixpath.normpath(posixpath.join(folder, out["path"])) == config.path]
        (out,) = outs
        if not _MD5.fullmatch(out["md5"]):
            raise ValueError(out["md5"])
        return {"md5": out["md5"], "size": out.get("size"), "nfiles": out.get("nfiles", 1)}
    except (yaml.YAMLError, TypeError, KeyError, ValueError, AttributeError, RecursionError):
        raise _not_tracked(config, where, text) from None


def _not_tracked(config: DataConfig, where: str, text: str) -> ConfigError:
    sentence = f"{where} does not track {config.path!r} by md5"
    if "<<<<<<<" in text:
        return ConfigError(
            f"{sentence}: it holds an unresolved merge conflict",
            hint=f"`git checkout --ours {config.tracked_by}` or `--theirs` chooses one side; then `ingot data pull`",
        )
    if not text.strip():
        return ConfigError(
            f"{sentence}: it is empty", hint=f"`git checkout {config.tracked_by}` brings it back; else `ingot data add`"
        )
    return ConfigError(sentence, hint=f"`ingot data add` tracks {config.path!r} with DVC")


def _dvc_file(config: DataConfig, project: Path) -> str:
    if config.rev is None:
        try:
            return (project / config.tracked_by).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            raise ConfigError(
                f"{project / config.tracked_by} does not exist", hint="`ingot data add` creates it from the corpus"
            ) from None
    shown = git(project, "show", f"{config.rev}:./{config.tracked_by}")
    if "not a git repository" in shown.stderr:
        raise ConfigError(
            f"data.rev = {config.rev!r}: {project} is no git repository, so that it has no revisions",
            hint="`git init`, then commit the recipes and data.dvc; or leave data.rev out",
        )
    if shown.returncode != 0:
        raise ConfigError(
            f"data.rev = {config.rev!r}: {shown.stderr.strip().removeprefix('fatal: ')}",
            hint="`git tag` and `git log data.dvc` list the revisions of the corpus; `git fetch --tags` brings more",
        )
    return shown.stdout


def git(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in a project; the caller looks at what it returned."""
    command = ["git", "-C", str(project), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "LC_ALL": "C"})


# ---- proof that files are what the hash says


def hash_tree(md5: Mapping[str, str]) -> str:
    """Return DVC's hash of a folder with these files (relative path -> md5)."""
    entries = [{"md5": md5[name], "relpath": name} for name in sorted(md5)]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + _DIRECTORY


def hash_files(path: Path, memo: HashMemo | None = None, project: Path | None = None) -> dict[str, str]:
    """Return relative path -> md5 of every file under a folder, or of the one file that `path` is.

    Args:
        path: the folder, or the file.
        memo: files that have not changed since they were hashed are not read.
        project: the folder with `.dvc`, whose `.dvcignore` files count; None where none do.

    Raises:
        IntegrityError: links are there that DVC does not follow.
    """
    md5_of = _md5 if memo is None else memo.hash
    root = path.parent if path.is_file() else path
    return {file.relative_to(root).as_posix(): md5_of(file) for file in corpus_files.files(path, project)}


def verify(config: DataConfig, project: Path, *, reread: bool = False) -> Corpus:
    """Compare the corpus in the work tree with what data.dvc says.

    Args:
        config: which corpus.
        project: the folder with data.dvc.
        reread: read every byte, also of files that have not changed since they were hashed. The rule for "not
            changed" is that of DVC's own state (size, inode, times), kept here because importing DVC alone takes
            longer than a cached run may.

    Raises:
        IntegrityError: missing or different; the message names the file, both hashes and the repair.
    """
    path = project / config.path
    if not path.exists():
        raise IntegrityError(f"{path} does not exist", hint="`ingot data pull` brings it from the DVC remote")
    expected = data_hash(config.model_copy(update={"rev": None}), project)
    return _verified(path, expected, project, _REPAIR, reread=reread)


def _verified(
    path: Path, expected: str, project: Path, hint: str, *, reread: bool = False, ignores: bool = True
) -> Corpus:
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    record = project / ".dvc" / "tmp" / f"ingot-md5-{place}.json"
    if reread:
        with contextlib.suppress(OSError):  # of a project that is somebody else's
            record.unlink(missing_ok=True)
    memo = HashMemo(record, _md5)
    found = hash_files(path, memo, project if ignores else None)
    memo.save()
    total = hash_tree(found) if path.is_dir() else next(iter(found.values()))
    if total != expected:
        difference = _first_difference(path, found, listing_of(expected, project))
        raise IntegrityError(
            f"{path} is not the corpus that was recorded: expected md5 {expected}, found {total}{difference}", hint=hint
        )
    return Corpus(path, expected, found)


def _first_difference(path: Path, found: Mapping[str, str], expected: Mapping[str, str] | None) -> str:
    if expected is None:
        return ""
    names = sorted(found.keys() | expected.keys())
    wrong = [name for name in names if found.get(name) != expected.get(name)]
    sentences = [
        f"\n    {path / name}: expected md5 {expected.get(name, '(none)')}, found {found.get(name, '(missing)')}"
        for name in wrong[:_NAMED]
    ]
    return "".join(sentences) + (f"\n    and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else "")


def listing_of(tree_hash: str, project: Path) -> dict[str, str] | None:
    """Return relative path -> md5 as recorded, from DVC's cache or from a remote that is a folder; None if unknown."""
    if not tree_hash.endswith(_DIRECTORY):
        return None  # of one file, which has no name of its own
    folders = [each.folder for each in remote.all_of(project).values() if each.folder is not None]
    for root in (project / ".dvc" / "cache", *folders):
        file = root / "files" / "md5" / tree_hash[:2] / tree_hash[2:]
        if file.is_file() and _md5(file) + _DIRECTORY == tree_hash:
            return {entry["relpath"]: entry["md5"] for entry in json.loads(file.read_text(encoding="utf-8"))}
    return None


def _md5(path: Path) -> str:
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            md5.update(chunk)
    return md5.hexdigest()


# ---- files for a run


def ensure(config: DataConfig, project: Path) -> None:
    """Pull the corpus when none of it is here. What is here is never overwritten: a run refuses it if it differs."""
    if config.rev is None and not (project / config.path).exists():
        log.info("%s is not here: pulling it from the DVC remote", config.path)
        pull(config, project)


def checkout_corpus(config: DataConfig, scratch: Path, project: Path) -> Corpus:
    """Return verified files of the configured corpus; at a revision, fetched below `scratch`, the work tree untouched.

    Raises:
        IntegrityError: the files are not what the DVC hash says.
        ConfigError: no such revision.
    """
    if config.rev is None:
        ensure(config, project)
        return verify(config, project)
    expected = data_hash(config, project)
    target = scratch / f"corpus-{expected.removesuffix(_DIRECTORY)}"
    if not target.exists():
        _fetch(config, target, project)
    # The .dvcignore of that revision has done its work; the present one may be another.
    hint = f"delete {target} and run again; else {dvc.RESTORE}"
    return _verified(target, expected, project, hint, ignores=False)


def _fetch(config: DataConfig, target: Path, project: Path) -> None:
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexDirError

    partial = target.with_name(f".{target.name}.partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        DVCFileSystem(str(project), rev=config.rev).get(config.path, str(partial), recursive=True)
    except (FileNotFoundError, DataIndexDirError, DvcException, OSError) as error:
        if isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError):
            raise IntegrityError(
                f"the corpus at {config.rev} is not in the DVC cache or remote: {error}", hint=dvc.RESTORE
            ) from None
        raise TransientError(f"fetching the corpus at {config.rev} failed: {error}", hint=dvc.CHECK_REMOTE) from error
    partial.rename(target)


def can_be_pulled(config: DataConfig, project: Path) -> bool:
    """Tell whether the project has a place to bring the corpus from: a DVC remote, or the cache."""
    in_cache = listing_of(data_hash(config, project), project) is not None
    return in_cache or bool(remote.all_of(project))


# ---- `ingot data ...`


def status(config: DataConfig, project: Path) -> dict[str, Any]:
    """Return the recorded hash, whether the work tree matches it and the remote has it; `do` says how to mend it."""
    entry = tracked(config, project)
    work_tree, do = "matches", {}
    try:
        verify(config, project, reread=True)
    except IntegrityError as error:
        work_tree, do = error.message, {"do": error.hint}
    facts = {"hash": entry["md5"], "bytes": entry["size"], "files": entry["nfiles"]}
    return facts | {"work_tree": work_tree, "remote": _remote_state(config, project, entry["md5"])} | do


def _remote_state(config: DataConfig, project: Path, md5: str) -> str:
    try:
        if not remote.has(project, md5):  # `dvc status` takes a remote that it may not look into for one that has all
            return "lacks this version: `ingot data push` sends it"
        said = json.loads(dvc.run(project, "status", "--cloud", "--json", config.tracked_by))
    except (ConfigError, TransientError) as error:
        return f"{error.message}; {error.hint}" if error.hint else error.message
    return "up to date" if not said else f"{len(said)} objects differ: `ingot data push` or `ingot data pull`"


def pull(config: DataConfig, project: Path, *, force: bool = False) -> dict[str, Any]:
    """Bring the recorded corpus from the DVC remote and verify it; edited files are kept unless `force`.

    Raises:
        IntegrityError: edited files are in the way, or the remote or cache lacks an object or has a damaged one.
        ConfigError: data.dvc is in conflict or missing, the corpus is a link, or see `dvc.run`.
        TransientError: the remote does not answer.
    """
    expected = data_hash(config, project)
    refuse_link(project / config.path)
    try:
        dvc.run(project, "pull", *(["--force"] if force else []), config.tracked_by)
    except IntegrityError as error:
        listing = listing_of(expected, project) or {}
        if bad := _bad_objects(listing, project):
            raise IntegrityError(error.message + bad, hint=dvc.RESTORE) from None
        raise
    # DVC trusts its cache without hashing it again.
    hint = "the DVC cache is damaged: delete .dvc/cache/files, then `ingot data pull --force`"
    corpus = _verified(project / config.path, expected, project, hint, reread=True)
    return {"hash": corpus.hash, "files": len(corpus.md5), "path": str(corpus.path)}


def _bad_objects(listing: Mapping[str, str], project: Path) -> str:
    """Say which objects the default remote lacks or has damaged, where it is a folder."""
    found = remote.default(project)
    if found is None or found.folder is None:
        return ""
    sentences = []
    for name, md5 in listing.items():
        file = found.folder / "files" / "md5" / md5[:2] / md5[2:]
        there = _md5(file) if file.is_file() else "(missing)"
        if there != md5:
            sentences.append(f"\n    {name} = {file}: expected md5 {md5}, found {there}")
    return "".join(sentences)


def push(config: DataConfig, project: Path, *, into_git: bool = False) -> dict[str, Any]:
    """Send the recorded corpus to the DVC remote.

    Args:
        config: which corpus.
        project: the folder with data.dvc.
        into_git: also where the remote is a folder that git would commit.

    Raises:
        ConfigError: it is such a folder; data.dvc is in conflict or missing; or see `dvc.run`.
        IntegrityError: the cache lacks an object.
        TransientError: the remote does not answer.
    """
    recorded = data_hash(config, project)
    refuse_committed(project, into_git=into_git)
    dvc.run(project, "push", config.tracked_by)
    return {"hash": recorded, "remote": "up to date"}


def refuse_committed(project: Path, *, into_git: bool) -> None:
    """Refuse to push into a folder that git would commit, unless that is wanted.

    Raises:
        ConfigError: the default remote is such a folder.
    """
    if not into_git and (folder := remote.committed_folder(project)) is not None:
        raise ConfigError(
            f"the DVC remote is {folder}, a folder that git commits: the corpus would join the repository",
            hint=f"{remote.NO_REMOTE}; or `ingot data push --into-git`",
        )


def refuse_link(path: Path) -> None:
    """Refuse a corpus that is a link itself.

    Raises:
        ConfigError: naming where it leads.
    """
    if path.is_symlink():
        raise ConfigError(
            f"{path} is a link to {path.readlink()}, and DVC records no links",
            hint=f"`ingot data import {path.resolve()}` after `rm {path}` takes a copy; or mount the folder there",
        )
