"""log and diff: the versions of the corpus that git knows, and what two of them have in common, by id and by text."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.core.errors import ConfigError
from pipelines.data import reader, versioning
from pipelines.data.clean import clean
from pipelines.data.config import DataConfig, PrepareConfig
from pipelines.data.records import Document

Numbers = NDArray[np.uint64]
Count = Callable[[Sequence[str]], list[int]]
"""Returns the tokens of each of some texts."""
WORK_TREE = "work tree"
_SAMPLES = 5
_AT_ONCE = 256
"""Documents whose tokens are counted together."""
_UNITS = "\x1f"


def log(config: DataConfig, project: Path, count: int) -> list[dict[str, Any]]:
    """Return the versions of the corpus, newest first, each with its revision, date, hash, files and bytes.

    Args:
        config: which corpus; from `config.rev` back where that is set.
        project: the folder with data.dvc.
        count: how many at most.

    Raises:
        ConfigError: no git repository, or no such revision.
    """
    form = f"--format=%H{_UNITS}%cs{_UNITS}%D{_UNITS}%s"
    start = [config.rev] if config.rev else []
    shown = versioning.git(project, "log", form, f"-n{count}", *start, "--", config.tracked_by)
    if shown.returncode:
        if "does not have any commits" in shown.stderr:
            return []
        said = next(iter(shown.stderr.strip().removeprefix("fatal: ").splitlines()), "git log failed")
        raise ConfigError(
            f"{project}: {said}", hint="`git init` makes a repository; `git tag`, `git log` list revisions"
        )
    rows = []
    for line in shown.stdout.splitlines():
        revision, date, names, subject = line.split(_UNITS, 3)
        rows.append({"revision": revision[:10], "date": date, **_facts(config, project, revision), "names": names})
        rows[-1]["subject"] = subject
    tracked_here = not config.rev and (project / config.tracked_by).exists()
    here = _facts(config, project, None) if tracked_here else None
    if here and (not rows or here["hash"] != rows[0]["hash"]):
        rows.insert(0, {"revision": WORK_TREE, "date": "", **here, "names": "", "subject": "not committed"})
    return rows


def _facts(config: DataConfig, project: Path, revision: str | None) -> dict[str, Any]:
    try:
        entry = versioning.tracked(config.model_copy(update={"rev": revision}), project)
    except ConfigError as error:  # it was deleted, or in conflict
        return {"hash": error.message.partition("\n")[0], "files": None, "bytes": None}
    return {"hash": entry["md5"], "files": entry["nfiles"], "bytes": entry["size"]}


# ---- diff


@dataclass
class _Side:
    """The documents of one version in the files that differ, as numbers: millions of them fit."""

    corpus: versioning.Corpus
    files: list[str]
    ids: array[int] = field(default_factory=lambda: array("Q"))
    texts: array[int] = field(default_factory=lambda: array("Q"))
    bytes: array[int] = field(default_factory=lambda: array("Q"))
    tokens: array[int] = field(default_factory=lambda: array("Q"))
    sources: array[int] = field(default_factory=lambda: array("Q"))


def diff(
    config: DataConfig,
    prepare: PrepareConfig,
    project: Path,
    old: str | None,
    new: str | None,
    count: Count | None = None,
) -> dict[str, Any]:
    """Return what joined, left or changed between two versions of the corpus.

    Documents are compared by their cleaned text first: one with the same text is the same, under another id `renamed`.
    What is left with an id of both versions has `changed`. Files that both versions have are not read, so that what
    they hold counts as the same and is not in the figures.

    Args:
        config: which corpus.
        prepare: how its files are read.
        project: the folder with data.dvc.
        old: a revision; None for the work tree.
        new: a revision; None for the work tree.
        count: counts tokens; without it there are none in the result.

    Raises:
        ConfigError: no such revision.
        IntegrityError: the files of a version are missing or damaged.
        TransientError: the remote does not answer.
    """
    scratch = project / ".dvc" / "tmp" / "ingot-diff"
    try:
        corpora = [
            versioning.checkout_corpus(config.model_copy(update={"rev": revision}), scratch, project)
            for revision in (old, new)
        ]
        return _compared(corpora, prepare, count) | {"old": old or WORK_TREE, "new": new or WORK_TREE}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _compared(corpora: list[versioning.Corpus], prepare: PrepareConfig, count: Count | None) -> dict[str, Any]:
    before, after = (set(each.md5.items()) for each in corpora)
    sides = [_Side(each, sorted(name for name, _ in set(each.md5.items()) - (before & after))) for each in corpora]
    names: dict[str, int] = {}
    for side in sides:
        _read(side, prepare, names, count)
    masks = _groups(*sides)
    groups = {
        "added": (sides[1], masks["added"]),
        "removed": (sides[0], masks["removed"]),
        "changed": (sides[1], masks["changed"]),
        "renamed": (sides[1], masks["renamed"]),
    }
    rows = [{"documents": name, **_sums(side, mask, count)} for name, (side, mask) in groups.items()]
    return {
        "hashes": [each.hash for each in corpora],
        "files": {
            "added": len({n for n, _ in after} - {n for n, _ in before}),
            "removed": len({n for n, _ in before} - {n for n, _ in after}),
            "changed": len({n for n, _ in after - before} & {n for n, _ in before}),
            "same": len(before & after),
        },
        "documents": rows,
        "sources": _by_source(sides, groups, list(names), count),
        "samples": {name: _named(side, mask, prepare) for name, (side, mask) in groups.items() if mask.any()},
    }


def _read(side: _Side, prepare: PrepareConfig, names: dict[str, int], count: Count | None) -> None:
    documents = _documents(side, prepare)
    while batch := list(itertools.islice(documents, _AT_ONCE)):
        texts = [clean(document.text) for document in batch]
        side.ids.extend(_number(document.id) for document in batch)
        side.texts.extend(map(_number, texts))
        side.bytes.extend(len(text.encode()) for text in texts)
        side.sources.extend(names.setdefault(document.source, len(names)) for document in batch)
        if count is not None:
            side.tokens.extend(count(texts))


def _documents(side: _Side, prepare: PrepareConfig) -> Iterator[Document]:
    found = reader.inspect(side.corpus.path, sorted(side.corpus.md5), prepare)
    for name in (each for each in side.files if each in found.kinds):
        records = reader.read_file(side.corpus.path, name, prepare, side.corpus.md5[name], few_texts=found.few_texts)
        yield from (record for record in records if isinstance(record, Document))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _groups(old: _Side, new: _Side) -> dict[str, NDArray[np.bool_]]:
    """Return which documents of the new version are added, changed, renamed, and which of the old one removed."""
    ids = [np.frombuffer(side.ids, dtype=np.uint64) for side in (old, new)]
    texts = [np.frombuffer(side.texts, dtype=np.uint64) for side in (old, new)]
    left, came = ~np.isin(texts[0], texts[1]), ~np.isin(texts[1], texts[0])
    pairs = [i * np.uint64(0x9E3779B97F4A7C15) + t for i, t in zip(ids, texts, strict=True)]
    changed = came & np.isin(ids[1], ids[0][left])
    return {
        "added": came & ~changed,
        "changed": changed,
        "renamed": ~came & ~np.isin(pairs[1], pairs[0]),
        "removed": left & ~np.isin(ids[0], ids[1][changed]),
    }


def _sums(side: _Side, mask: NDArray[np.bool_], count: Count | None) -> dict[str, int]:
    sums = {"number": int(mask.sum()), "bytes": int(np.frombuffer(side.bytes, dtype=np.uint64)[mask].sum())}
    if count is not None:
        sums["tokens"] = int(np.frombuffer(side.tokens, dtype=np.uint64)[mask].sum())
    return sums


def _by_source(
    sides: list[_Side], groups: dict[str, tuple[_Side, NDArray[np.bool_]]], names: list[str], count: Count | None
) -> list[dict[str, Any]]:
    """Return a row for each source with a document that is not the same: counts, and by how much it grew."""
    rows = []
    for number, name in enumerate(names):
        inside = [np.frombuffer(side.sources, dtype=np.uint64) == number for side in sides]
        of_side = {id(side): mask for side, mask in zip(sides, inside, strict=True)}
        row = {kind: int((mask & of_side[id(side)]).sum()) for kind, (side, mask) in groups.items()}
        before, after = (_sums(side, mask, count) for side, mask in zip(sides, inside, strict=True))
        growth = {f"{unit} more": after[unit] - before[unit] for unit in after if unit != "number"}
        if any(row.values()) or any(growth.values()):
            rows.append({"source": name, **row, **growth})
    return rows


def _named(side: _Side, mask: NDArray[np.bool_], prepare: PrepareConfig) -> list[str]:
    """Return the ids of the first documents of a group; the files are read again up to the last of them."""
    wanted = set(np.flatnonzero(mask)[:_SAMPLES].tolist())
    numbered = enumerate(itertools.islice(_documents(side, prepare), max(wanted) + 1))
    return [document.id for number, document in numbered if number in wanted]


def counted_with(tokenizer: Path) -> Count:
    """Return a counter of tokens by a saved tokenizer.

    Args:
        tokenizer: its folder.

    Raises:
        ConfigError: there is none.
    """
    from pipelines.data import tokenizer as tokenization
    from pipelines.data.encoder import Encoder

    encode = Encoder(tokenization.load(tokenizer, may_grow=False).tokenizer, [])
    return lambda texts: [len(ids) for ids in encode(texts)]
