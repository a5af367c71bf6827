"""Make a corpus of a folder of texts: JSON Lines as they are, Parquet and plain text as JSON Lines, the rest named.

A plain text file is a document. One that is longer is cut between paragraphs into several, which belong to one work
where there are files enough for a split into train, validation and test; else every part is a work by itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.data import reader
from pipelines.data.document_files import DocumentWriter
from pipelines.data.records import Document, Quarantined

TEXT = (".txt", ".text", ".md", ".markdown", ".rst")
PARQUET = (".parquet",)
READS = "JSON Lines (.jsonl, .jsonl.gz, .jsonl.zst), Parquet (.parquet), plain text (.txt, .md, .rst)"
_PART_CHARACTERS = 20_000
"""Length from which a plain text is cut: a chapter, not a book, so that near-duplicates and splits find their way."""
_FEW_FILES = 20
_LOOK_AT = 100
"""Records of a JSON Lines file that may be malformed before it is taken for something else."""
_COUNTED = 10_000
"""Documents of a JSON Lines file that are counted: what a split of few documents must know."""
_LINE_BYTES = 16 << 20
_COLUMNS = ("id", "text", "source", "license", "work")
_UNKNOWN = "unknown"


@dataclass
class Taken:
    """What became of the files of a source."""

    files: Counter[str] = field(default_factory=Counter)
    """Kind -> files taken."""
    documents: Counter[str] = field(default_factory=Counter)
    """Kind -> documents; of each JSON Lines file at most 10,000 are counted, all are read when it is prepared."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(file, why) of every file that was not taken."""
    parts_are_works: bool = False
    """Whether the parts of one plain text may end up in train and in test."""
    cut: int = 0
    """Plain texts that were cut into parts."""


def convert(source: Path, target: Path) -> Taken:
    """Write a corpus to a new folder.

    Args:
        source: a folder, read with all below it, or one file.
        target: the folder; it must not exist.

    Raises:
        ConfigError: nothing there can be read; the message names what there is.
    """
    taken = Taken()
    files = sorted(_files(source, taken))
    root = source.parent if source.is_file() else source
    texts = [path for path in files if path.suffix.lower() in TEXT]
    taken.parts_are_works = len(texts) < _FEW_FILES
    target.mkdir(parents=True)
    try:
        with contextlib.ExitStack() as open_files:
            writer = _Lazy(target / _free_name({path.name for path in files}), open_files)
            for path in files:
                name = path.relative_to(root).as_posix()
                try:
                    _take(path, name, target, taken, writer)
                except _Unreadable as error:
                    taken.left_out.append((name, str(error)))
        if not taken.files:
            raise ConfigError(
                f"{source} holds nothing that can be read{_named(taken)}", hint=f"Ingot reads {READS}; convert the rest"
            )
    except BaseException:
        shutil.rmtree(target)
        raise
    return taken


def summary(taken: Taken) -> list[str]:
    """Return what was taken and what was not, a sentence a line."""
    lines = []
    for kind, files in sorted(taken.files.items()):
        more = " or more" if kind == "JSON Lines" and taken.documents[kind] >= _COUNTED else ""
        made = f", {taken.documents[kind]:,} documents{more}"
        lines.append(f"{kind}: {files:,} {'file' if files == 1 else 'files'}{made}")
    if taken.cut:
        where = (
            f"which may lie on both sides of the split: there are fewer than {_FEW_FILES} files"
            if taken.parts_are_works
            else "which stay on one side of the split"
        )
        lines.append(f"plain text: {taken.cut:,} were cut into parts of about {_PART_CHARACTERS:,} characters, {where}")
    reasons = Counter(why for _, why in taken.left_out)
    for why, count in sorted(reasons.items()):
        example = next(name for name, reason in taken.left_out if reason == why)
        lines.append(f"not taken: {count:,} x {why}; {'it is' if count == 1 else 'one is'} {example}")
    return lines


class _Unreadable(ValueError):
    """A file cannot be taken; the message is the reason."""


class _Lazy:
    """A writer whose file comes into being with the first document."""

    def __init__(self, path: Path, open_files: contextlib.ExitStack) -> None:
        self._path, self._open_files = path, open_files
        self._writer: DocumentWriter | None = None

    def write(self, document: Document) -> None:
        if self._writer is None:
            self._writer = self._open_files.enter_context(DocumentWriter(self._path))
        self._writer.write(document)


def _files(source: Path, taken: Taken) -> Iterator[Path]:
    """Yield the files below a folder, through links too; hidden ones and links in circles are noted as left out."""
    if source.is_file():
        yield source
        return
    seen = {source.resolve()}
    for folder, names, files in os.walk(source, followlinks=True):
        here = Path(folder)
        for name in sorted(names):
            place = (here / name).resolve()
            if name.startswith(".") or place in seen:
                names.remove(name)
                why = "a hidden folder" if name.startswith(".") else "a link to a folder that was read already"
                taken.left_out.append(((here / name).relative_to(source).as_posix() + "/", why))
            seen.add(place)
        for name in files:
            if name.startswith("."):
                taken.left_out.append(((here / name).relative_to(source).as_posix(), "a hidden file"))
            else:
                yield here / name


def _take(path: Path, name: str, target: Path, taken: Taken, writer: _Lazy) -> None:
    suffix = path.suffix.lower()
    if not path.exists():
        raise _Unreadable("a link to nothing")
    if path.stat().st_size == 0:
        raise _Unreadable("empty")
    if name.endswith(reader.SUFFIXES):
        taken.documents["JSON Lines"] += _check_lines(path)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
        taken.files["JSON Lines"] += 1
        return
    if suffix in TEXT:
        kind, documents = "plain text", _of_text(path, name, taken)
    elif suffix in PARQUET:
        kind, documents = "Parquet", _of_parquet(path, name)
    else:
        raise _Unreadable(f"{suffix or 'no suffix'}: not a format that is read")
    for document in documents:
        if document.text:
            writer.write(document)
            taken.documents[kind] += 1
        else:
            taken.left_out.append((f"{name}, id {document.id}", "a row without text"))
    taken.files[kind] += 1


def _check_lines(path: Path) -> int:
    """Return the number of documents of a JSON Lines file, `_COUNTED` at most; refuse one that begins with none."""
    reasons: list[str] = []
    documents = 0
    for record in reader.read(path, max_line_bytes=_LINE_BYTES):
        if isinstance(record, Quarantined):
            reasons.append(record.reason)
        else:
            documents += 1
        if documents == _COUNTED or (not documents and len(reasons) == _LOOK_AT):
            break
    if not documents:
        why = reasons[0] if reasons else "only blank lines"
        raise _Unreadable(f"none of its first lines is an object with the field `text`: {why}")
    return documents


def _of_text(path: Path, name: str, taken: Taken) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise _Unreadable("not UTF-8") from None
    if not text.strip() or "\0" in text:
        raise _Unreadable("NUL bytes: not a text" if text.strip() else "blank")
    source = name.partition("/")[0] if "/" in name else "text"
    parts = list(_parts(text))
    taken.cut += len(parts) > 1
    for number, part in enumerate(parts):
        identity = name if len(parts) == 1 else f"{name}#{number + 1}"
        work = identity if taken.parts_are_works else name
        yield Document(id=identity, text=part, source=source, license=_UNKNOWN, work=work)


def _parts(text: str) -> Iterator[str]:
    """Yield a text in parts of about `_PART_CHARACTERS`, cut between paragraphs, or else between lines."""
    part: list[str] = []
    size = 0
    separator = "\n\n" if "\n\n" in text else "\n"
    for paragraph in text.replace("\r\n", "\n").split(separator):
        if size and size + len(paragraph) > _PART_CHARACTERS:
            yield separator.join(part)
            part, size = [], 0
        part.append(paragraph)
        size += len(paragraph) + len(separator)
    yield separator.join(part)


def _of_parquet(path: Path, name: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _Unreadable(f"not Parquet that can be read: {error}") from None
    columns = {field.name: str(field.type) for field in table.schema_arrow}
    if columns.get("text") not in {"string", "large_string", "string_view"}:
        there = ", ".join(f"{column} ({kind})" for column, kind in columns.items())
        raise _Unreadable(f"no column `text` of strings; there is {there}")
    number = 0
    try:
        for batch in table.iter_batches(batch_size=1024, columns=[c for c in _COLUMNS if c in columns]):
            for row in batch.to_pylist():
                number += 1
                yield _of_row(row, f"{name}:{number}")
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"{path} is damaged after row {number}: {error}", hint="repair or remove it") from None


def _of_row(row: dict[str, Any], default_id: str) -> Document:
    given = {key: str(value) for key, value in row.items() if value is not None}
    return Document(
        id=given.get("id", default_id),
        text=given.get("text", ""),
        source=given.get("source", _UNKNOWN),
        license=given.get("license", _UNKNOWN),
        work=given.get("work", ""),
    )


def _free_name(names: set[str]) -> str:
    """Return a name for the converted texts that no file of the source has."""
    stem = "converted"
    while f"{stem}.jsonl.zst" in names:
        stem += "-texts"
    return f"{stem}.jsonl.zst"


def _named(taken: Taken) -> str:
    reasons = Counter(why for _, why in taken.left_out)
    return "".join(f"\n    {count} x {why}" for why, count in reasons.most_common(10)) or ": it has no file"
