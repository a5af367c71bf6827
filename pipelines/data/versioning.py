"""Which corpus a run uses, proved by hash. DVC versions the data; this module reads what DVC wrote.

`data.dvc` names the corpus by one hash: the md5 of a file, or, for a folder, of a JSON list of the md5 and path of
every file in it. Reading that needs no DVC, so a plan knows the hash in milliseconds. DVC itself runs when files have
to move.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import logging
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
from pipelines.data import corpus_files, dvc, importing, reader
from pipelines.data.config import DataConfig, PrepareConfig

log = logging.getLogger(__name__)

_REPAIR = (
    "`dvc pull --force {dvc_file}` restores the recorded corpus; `ingot data add` records this one as a new version"
)
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
    return str(_tracked(config, project)["md5"])


def tracked_bytes(config: DataConfig, project: Path) -> int | None:
    """Return the size of the configured corpus as DVC tracks it; None where the DVC file does not say."""
    size = _tracked(config, project)["size"]
    return size if isinstance(size, int) else None


def _tracked(config: DataConfig, project: Path) -> dict[str, Any]:
    """Return the entry of data.dvc for the corpus: md5, size, nfiles."""
    text = _dvc_file(config, project)
    where = config.dvc_file + (f" at {config.rev}" if config.rev else "")
    try:
        outs = yaml.safe_load(text)["outs"]
        (out,) = [out for out in outs if out["path"] == config.path]
        if not _MD5.fullmatch(out["md5"]):
            raise ValueError(out["md5"])
        return {"md5": out["md5"], "size": out.get("size"), "nfiles": out.get("nfiles", 1)}
    except (yaml.YAMLError, TypeError, KeyError, ValueError, RecursionError):
        raise _not_tracked(config, where, text) from None


def _not_tracked(config: DataConfig, where: str, text: str) -> ConfigError:
    sentence = f"{where} does not track {config.path!r} by md5"
    if "<<<<<<<" in text:
        return ConfigError(
            f"{sentence}: it holds an unresolved merge conflict",
            hint=f"`git checkout --ours {config.dvc_file}` or `--theirs` chooses one side; then `ingot data pull`",
        )
    if not text.strip():
        return ConfigError(
            f"{sentence}: it is empty", hint=f"`git checkout {config.dvc_file}` brings it back; else `ingot data add`"
        )
    return ConfigError(sentence, hint=f"`ingot data add` tracks {config.path!r} with DVC")


def _dvc_file(config: DataConfig, project: Path) -> str:
    if config.rev is None:
        try:
            return (project / config.dvc_file).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            raise ConfigError(
                f"{project / config.dvc_file} does not exist", hint="`ingot data add` creates it from the corpus"
            ) from None
    shown = _git(project, "show", f"{config.rev}:./{config.dvc_file}")
    if shown.returncode != 0:
        raise ConfigError(
            f"data.rev = {config.rev!r}: {shown.stderr.strip().removeprefix('fatal: ')}",
            hint="`git tag` and `git log data.dvc` list the revisions of the corpus; `git fetch --tags` brings more",
        )
    return shown.stdout


def _git(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(project), *arguments], capture_output=True, text=True, timeout=60)


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
    return _verified(path, expected, project, _REPAIR.format(dvc_file=config.dvc_file), reread=reread)


def _verified(
    path: Path, expected: str, project: Path, hint: str, *, reread: bool = False, ignores: bool = True
) -> Corpus:
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    memo = None if reread else HashMemo(project / ".dvc" / "tmp" / f"ingot-md5-{place}.json", _md5)
    found = hash_files(path, memo, project if ignores else None)
    if memo is not None:
        memo.save()
    total = hash_tree(found) if path.is_dir() else next(iter(found.values()))
    if total != expected:
        difference = _first_difference(path, found, _listing(expected, project))
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


def _listing(tree_hash: str, project: Path) -> dict[str, str] | None:
    """Return relative path -> md5 as recorded, from DVC's cache or from a remote that is a folder; None if unknown."""
    if not tree_hash.endswith(_DIRECTORY):
        return None
    for root in (project / ".dvc" / "cache", *_local_remotes(project)):
        file = root / "files" / "md5" / tree_hash[:2] / tree_hash[2:]
        if file.is_file() and _md5(file) + _DIRECTORY == tree_hash:
            return {entry["relpath"]: entry["md5"] for entry in json.loads(file.read_text(encoding="utf-8"))}
    return None


def _local_remotes(project: Path) -> list[Path]:
    """Return the remotes that are folders; relative ones are relative to `.dvc/`."""
    return [(project / ".dvc" / url).resolve() for url in _remotes(project) if "://" not in url]


def _remotes(project: Path) -> list[str]:
    """Return the addresses of the remotes in DVC's configuration."""
    config = configparser.ConfigParser(interpolation=None)
    config.read([project / ".dvc" / "config", project / ".dvc" / "config.local"], encoding="utf-8")
    return [config[section]["url"] for section in config.sections() if "remote" in section and "url" in config[section]]


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
    in_cache = _listing(data_hash(config, project), project) is not None
    return in_cache or bool(_remotes(project))


# ---- `ingot data ...`


def status(config: DataConfig, project: Path) -> dict[str, Any]:
    """Return the recorded hash, whether the work tree matches it and the remote has it; `do` says how to mend it."""
    tracked = _tracked(config, project)
    work_tree, do = "matches", {}
    try:
        verify(config, project, reread=True)
    except IntegrityError as error:
        work_tree, do = error.message, {"do": error.hint}
    try:
        said = json.loads(dvc.run(project, "status", "--cloud", "--json", config.dvc_file))
        remote = "up to date" if not said else f"{len(said)} objects differ: `ingot data push` or `ingot data pull`"
    except TransientError as error:
        remote = error.message
    facts = {"hash": tracked["md5"], "bytes": tracked["size"], "files": tracked["nfiles"]}
    return facts | {"work_tree": work_tree, "remote": remote} | do


def pull(config: DataConfig, project: Path, *, force: bool = False) -> dict[str, Any]:
    """Bring the recorded corpus from the DVC remote and verify it; edited files are kept unless `force`.

    Raises:
        IntegrityError: edited files are in the way, or the remote or cache lacks an object or has a damaged one.
    """
    try:
        dvc.run(project, "pull", *(["--force"] if force else []), config.dvc_file)
    except (IntegrityError, TransientError) as error:
        listing = _listing(data_hash(config, project), project) or {}
        if bad := _bad_objects(listing, project):
            raise IntegrityError(error.message + bad, hint=dvc.RESTORE) from None
        raise
    # DVC trusts its cache without hashing it again.
    hint = f"the DVC cache is damaged: delete .dvc/cache/files, then `dvc pull --force {config.dvc_file}`"
    corpus = _verified(project / config.path, data_hash(config, project), project, hint, reread=True)
    return {"hash": corpus.hash, "files": len(corpus.md5), "path": str(corpus.path)}


def _bad_objects(listing: Mapping[str, str], project: Path) -> str:
    """Say which objects a remote that is a folder lacks or has damaged."""
    sentences = []
    for remote in _local_remotes(project):
        for name, md5 in listing.items():
            file = remote / "files" / "md5" / md5[:2] / md5[2:]
            found = _md5(file) if file.is_file() else "(missing)"
            if found != md5:
                sentences.append(f"\n    {name} = {file}: expected md5 {md5}, found {found}")
    return "".join(sentences)


def push(config: DataConfig, project: Path) -> dict[str, Any]:
    """Send the recorded corpus to the DVC remote."""
    dvc.run(project, "push", config.dvc_file)
    return {"hash": data_hash(config, project), "remote": "up to date"}


def add(config: DataConfig, project: Path) -> dict[str, Any]:
    """Record the corpus in the work tree as a new version: writes data.dvc, which is then committed to git.

    Raises:
        ConfigError: there is nothing, or it is a link, which DVC does not record.
        IntegrityError: links within, which DVC would leave out.
    """
    path = project / config.path
    if path.is_symlink():
        raise ConfigError(
            f"{path} is a link to {path.readlink()}, and DVC records no links",
            hint=f"`ingot data import {path.resolve()}` after `rm {path}` takes a copy; or mount the folder there",
        )
    if not path.exists():
        raise ConfigError(f"{path} does not exist", hint="put texts there first, or `ingot data import` them")
    corpus_files.files(path, project)
    before = _recorded(config, project)
    dvc.run(project, "add", config.path)
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
    taken = importing.bring(url, path, project / ".dvc" / "tmp" / "ingot-import")
    recorded = add(config, project)
    return {"taken": "; ".join(importing.summary(taken)), **recorded}


def _recorded(config: DataConfig, project: Path) -> dict[str, str]:
    """Return relative path -> md5 of what data.dvc names now, as far as that is known here."""
    if not (project / config.dvc_file).exists():
        return {}
    return _listing(data_hash(config, project), project) or {}


def _recording(config: DataConfig, project: Path, before: Mapping[str, str]) -> dict[str, Any]:
    """Say what the corpus consists of now: nothing joins an older corpus, or is passed over, in silence."""
    tracked, after = _tracked(config, project), _recorded(config, project)
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
        "next": f"git add {config.dvc_file} && git commit; then `ingot data push`",
    }


def _unread(path: Path, names: list[str]) -> list[str]:
    """Return the files that no run reads, each with what it is."""
    names = names if path.is_dir() else [path.name]
    return list(map(str, reader.inspect(path, names, PrepareConfig(), records_too=False).unread))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(sorted(names)[:_NAMED]) + more
