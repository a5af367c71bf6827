"""Bring a corpus from elsewhere: a path, S3, HTTP or anything that fsspec reaches, one file, a folder or a pattern.

Files stay the bytes that they are; those that cannot be read are not taken, and said. What was brought before a
fault is not brought again.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import http
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.core.errors import ConfigError, IngotError, TransientError
from pipelines.core.redaction import redact
from pipelines.core.safe_path import safe_join
from pipelines.data import reader
from pipelines.data.config import PrepareConfig

_AT_A_TIME = 8
"""Files that are fetched side by side."""
_NAMES = {
    "jsonl": "JSON Lines",
    "json": "JSON",
    "csv": "CSV",
    "parquet": "Parquet",
    "warc": "WARC",
    "text": "plain text",
}
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub", "sftp": "paramiko"}
CREDENTIALS = (
    "credentials come from the environment, as AWS tools read it: AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL"
)

_AGAIN = "run the same command again: files that have arrived are not fetched again"
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError"}
_MAY_PASS = {408, 429}
"""Statuses of a request that is right, but comes at the wrong time."""


@dataclass
class Taken:
    """What became of the files of a source."""

    files: Counter[str] = field(default_factory=Counter)
    """Format -> files taken."""
    left_out: list[reader.Unread] = field(default_factory=list)
    """Every file that was not taken."""


def bring(source: str, target: Path, scratch: Path) -> Taken:
    """Bring a corpus into a new folder.

    Args:
        source: a path or a URL, which may be a pattern (`*`, `**`, `?`, `[...]`).
        target: the folder; it must not exist.
        scratch: folder for what is under way; a later attempt goes on with it.

    Raises:
        ConfigError: there is nothing, nothing that can be read, no access, or no package for such URLs.
        TransientError: the network or the server failed; what has arrived stays in `scratch`.
    """
    taken = Taken()
    if "://" not in source:
        names = dict(_local(source, taken))
        root = None
    else:
        root = scratch / hashlib.sha256(source.encode()).hexdigest()[:16]
        names = {name: root / name for name in _fetch(source, root, taken)}
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, path in sorted(names.items()):
            found = reader.inspect(path, [path.name], PrepareConfig(), records_too=False)
            if any(part.startswith(".") for part in PurePosixPath(name).parts) and not found.unread:
                found.unread.append(reader.Unread(name, "a hidden file", ""))
            if found.unread:
                taken.left_out.append(reader.Unread(name, found.unread[0].reason, found.unread[0].do))
                continue
            taken.files[found.kinds[path.name]] += 1
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            if root is None:
                shutil.copyfile(path, partial / name)
            else:
                path.rename(partial / name)
        if not taken.files:
            raise ConfigError(
                f"{redact(source)} holds nothing that can be read{_named(taken)}",
                hint=f"Ingot reads {reader.READS}; convert the rest",
            )
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if root is not None:
        shutil.rmtree(root, ignore_errors=True)
    return taken


def summary(taken: Taken) -> list[str]:
    """Return what was taken and what was not, a sentence a line."""
    lines = [
        f"{_NAMES.get(kind, kind)}: {files:,} {'file' if files == 1 else 'files'}"
        for kind, files in sorted(taken.files.items())
    ]
    for why, names in _reasons(taken).items():
        lines.append(f"not taken: {len(names):,} x {why}; {'it is' if len(names) == 1 else 'one is'} {names[0]}")
    return lines


def _reasons(taken: Taken) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for one in taken.left_out:
        reasons.setdefault(one.reason, []).append(one.name)
    return dict(sorted(reasons.items()))


def _named(taken: Taken) -> str:
    reasons = list(_reasons(taken).items())[:10]
    return "".join(f"\n    {len(names)} x {why}: {names[0]}" for why, names in reasons) or ": it has no file"


# ---- from this machine


def _local(source: str, taken: Taken) -> Iterator[tuple[str, Path]]:
    """Yield (name, place) of the files at a path or pattern, through links too."""
    place = Path(source).expanduser().absolute()
    if place.is_file():
        yield place.name, place
    elif place.is_dir():
        yield from ((path.relative_to(place).as_posix(), path) for path in _below(place, place, taken))
    elif glob.has_magic(source):
        root = Path(_root(str(place)))
        for found in sorted(map(Path, glob.glob(str(place), recursive=True, include_hidden=True))):  # noqa: PTH207 - `**` with `~` and links
            if found.is_file():
                yield found.relative_to(root).as_posix(), found
    elif not place.exists():
        raise ConfigError(
            f"{place} does not exist", hint="give a file, a folder, a pattern, or a URL as s3://bucket/texts"
        )


def _below(source: Path, folder: Path, taken: Taken) -> Iterator[Path]:
    """Yield the files below a folder; hidden folders, links in circles and links to nothing are noted as left out."""
    seen = {source.resolve()}
    for here, names, files in os.walk(folder, followlinks=True):
        for name in sorted(names):
            place = Path(here) / name
            if name.startswith(".") or place.resolve() in seen:
                names.remove(name)
                why = "a hidden folder" if name.startswith(".") else "a link to a folder that was read already"
                taken.left_out.append(reader.Unread(place.relative_to(source).as_posix() + "/", why, ""))
            seen.add(place.resolve())
        for name in sorted(files):
            place = Path(here) / name
            if place.is_file():
                yield place
            else:
                taken.left_out.append(reader.Unread(place.relative_to(source).as_posix(), "a link to nothing", ""))


def _root(pattern: str) -> str:
    """Return the folder above the first part of a pattern that is one."""
    parts = pattern.split("/")
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first])


# ---- from elsewhere


def _fetch(url: str, root: Path, taken: Taken) -> list[str]:
    """Fetch the files at a URL into a folder and return their names; those that are there already stay."""
    import fsspec

    with explained(url):
        system, path = fsspec.core.url_to_fs(url)
        files = _listed(system, path, url)
    if not files:
        raise ConfigError(f"there is nothing at {redact(url)}", hint=f"check the address; {CREDENTIALS}")
    hidden = [name for name in files if any(part.startswith(".") for part in PurePosixPath(name).parts)]
    taken.left_out += [reader.Unread(name, "a hidden file", "") for name in hidden]
    wanted = {name: found for name, found in files.items() if name not in hidden}

    def get(name: str) -> None:
        place, (remote, size) = safe_join(root, name, said_by=redact(url)), wanted[name]
        if place.is_file() and size in {None, place.stat().st_size}:
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(place.name + ".part")
        system.get_file(remote, str(partial))
        if size is not None and partial.stat().st_size != size:
            raise ConnectionError(f"{partial.stat().st_size:,} of {size:,} bytes arrived")
        partial.rename(place)

    with explained(url), ThreadPoolExecutor(_AT_A_TIME) as pool:
        for done in [pool.submit(get, name) for name in wanted]:
            done.result()
    return list(wanted)


def _listed(system: Any, path: str, url: str) -> dict[str, tuple[str, int | None]]:
    """Return name -> (place, size) of the files at a path of a file system."""
    web = url.startswith(("http://", "https://"))
    if any(mark in path for mark in ("*", "[") if not web or "*" in path) or (not web and "?" in path):
        found = system.glob(path, detail=True)
        root = _root(path)
    elif web and not path.endswith("/"):
        last = re.split(r"[?#]", path)[0].rpartition("/")[2] or "corpus"
        return {last: (path, system.info(path).get("size"))}
    elif not web and system.isfile(path):
        return {PurePosixPath(path).name: (path, system.info(path).get("size"))}
    else:
        found = system.find(path, detail=True)
        root = path.rstrip("/")
    return {
        place.removeprefix(root).lstrip("/"): (place, about.get("size"))
        for place, about in found.items()
        if about.get("type") == "file" and not place.endswith("/")
    }


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Convert what libraries raise for a URL to errors that say what to do."""
    try:
        yield
    except IngotError:
        raise
    except Exception as error:  # noqa: BLE001 - botocore and aiohttp have trees of their own
        # fsspec calls every fault of a web server a missing file, and keeps what it was.
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        raise _explanation(url, cause) from None


def _explanation(url: str, error: BaseException) -> IngotError:
    shown, said = redact(url), str(error) or type(error).__name__
    response = getattr(error, "response", None) or {}
    status = getattr(error, "status", None) or response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(error, FileNotFoundError) or status == http.HTTPStatus.NOT_FOUND:
        return ConfigError(f"there is nothing at {shown}: {said}", hint=f"check the address; {CREDENTIALS}")
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, PermissionError) or kinds & _NO_CREDENTIALS or status in {401, 403}:
        return ConfigError(f"no access to {shown}: {said}", hint=CREDENTIALS)
    if isinstance(error, (ImportError, ValueError)):
        scheme = url.partition("://")[0]
        package = _PACKAGES.get(scheme)
        do = f"`pip install {package}` brings what reads {scheme}://" if package else "give s3://, https:// or a path"
        return ConfigError(f"{shown}: {said}", hint=do)
    if isinstance(status, int) and 400 <= status < 500 and status not in _MAY_PASS:
        return ConfigError(f"{shown}: {said}", hint="check the address")
    return TransientError(f"{shown} cannot be reached: {said}", hint=_AGAIN)
