"""Reading the corpus: files of any format that is known, as a stream of documents in bounded memory.

What a file is follows from its content (`kinds`), also through compression (`expand`) and another encoding; `formats`
take its records out. A record that is no document becomes a `Quarantined` one and reading goes on. A file that cannot
be read is refused by name before anything is read. Raw bytes are hashed as they pass, so a corpus that is replaced
while it is read is noticed.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from pipelines.core.errors import IntegrityError
from pipelines.data import corpus_files, expand, formats, kinds, records
from pipelines.data.config import PrepareConfig
from pipelines.data.formats import TOO_LONG
from pipelines.data.formats.text import FEW_FILES
from pipelines.data.kinds import UnreadableError
from pipelines.data.records import DAMAGED_SHARD, Document, MalformedRecordError, Quarantined, Row

READS = "JSON Lines, JSON, CSV, Parquet, WARC and plain text, plain or in gzip, zstd, bzip2, xz"
READ_BYTES = 16 << 10
"""Compressed bytes per read."""
_LOOK_AT = 100
"""Records of a file that may be malformed before all of it is taken to be."""
_LAYERS = 3
"""Compressions within each other that are followed."""
_NAMED = 5


@dataclass
class Unread:
    """A file of the corpus that is not read."""

    name: str
    reason: str
    do: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" + (f" ({self.do})" if self.do else "")


@dataclass
class Inspection:
    """What the files of a corpus are."""

    kinds: dict[str, str] = field(default_factory=dict)
    """Name of each file that is read, in order -> its format."""
    unread: list[Unread] = field(default_factory=list)
    """Files that were chosen and cannot be read."""
    left_out: list[str] = field(default_factory=list)
    """Files that `prepare.files` does not choose."""

    @property
    def few_texts(self) -> bool:
        """Whether there are too few plain texts for a split, were each one work."""
        return sum(kind == "text" for kind in self.kinds.values()) < FEW_FILES


def inspect(folder: Path, names: Sequence[str], config: PrepareConfig, *, records_too: bool = True) -> Inspection:
    """Say what each file of a corpus is, from its first bytes.

    Args:
        folder: the corpus, a folder or one file.
        names: its files, relative to it.
        config: which are chosen, and how they are read.
        records_too: whether the first records are looked at, which must have the field of the text.
    """
    names = [name for name in names if PurePath(name).name != corpus_files.IGNORE_FILE]
    chosen = set(corpus_files.selected(names, config.files))
    found = Inspection(left_out=[name for name in names if name not in chosen])
    for name in (name for name in names if name in chosen):
        try:
            found.kinds[name] = _Opened(_place(folder, name), name, config).kind
            if records_too:
                _refuse_without_documents(folder, name, config)
        except UnreadableError as error:
            found.kinds.pop(name, None)
            found.unread.append(Unread(name, str(error), error.do))
        except expand.DamagedError as error:
            found.kinds.pop(name, None)
            found.unread.append(Unread(name, f"{DAMAGED_SHARD}: {error}", "bring it again"))
    return found


def refuse_unread(found: Inspection, folder: Path) -> None:
    """Refuse a corpus of which files would be left out.

    Raises:
        IntegrityError: it names them, what they are, and how they are left out on purpose.
    """
    if found.unread:
        named = "".join(f"\n    {one}" for one in found.unread[:_NAMED])
        more = f"\n    and {len(found.unread) - _NAMED} more" if len(found.unread) > _NAMED else ""
        several = len(found.unread) > 1
        raise IntegrityError(
            f"{len(found.unread)} {'files' if several else 'file'} of {folder} cannot be read:{named}{more}",
            hint=next((f"{one.do}; else " for one in found.unread if "prepare." in one.do), "")
            + f"to go on without {'them, remove them or list them' if several else 'it, remove it or list it'} in "
            f'.dvcignore, then `ingot data add`; or prepare.files=["*", "!{found.unread[0].name}"]',
        )
    if not found.kinds:
        raise IntegrityError(
            f"{folder} holds no corpus: "
            + (f"prepare.files chooses none of its {len(found.left_out)} files" if found.left_out else "no file"),
            hint=f"add texts ({READS}), then `ingot data add`; prepare.files chooses among them",
        )


def read(
    folder: Path, config: PrepareConfig | None = None, *, md5: Mapping[str, str] | None = None
) -> Iterator[Document | Quarantined]:
    """Yield every record of the corpus in order: a document, or why there is none.

    Args:
        folder: the corpus, a folder or one file.
        config: which files, which fields, how far.
        md5: name relative to `folder` -> expected md5 of the file's bytes: the files of the corpus; None takes those
            that are there.

    Raises:
        IntegrityError: a file cannot be read, there is none, or its bytes are not the expected ones.
    """
    config = config or PrepareConfig()
    names = sorted(md5) if md5 is not None else relative_names(folder)
    found = inspect(folder, names, config)
    refuse_unread(found, folder)
    for name in found.kinds:
        yield from read_file(folder, name, config, (md5 or {}).get(name), few_texts=found.few_texts)


def relative_names(folder: Path, project: Path | None = None) -> list[str]:
    """Return the names of the files of a corpus, relative to it; of a single file, its own."""
    root = folder.parent if folder.is_file() else folder
    return [path.relative_to(root).as_posix() for path in corpus_files.files(folder, project)]


def read_file(
    folder: Path, name: str, config: PrepareConfig, md5: str | None = None, *, few_texts: bool = True
) -> Iterator[Document | Quarantined]:
    """Yield every record of one file; see `read`.

    Raises:
        UnreadableError: it cannot be read.
        IntegrityError: its bytes are not the expected ones.
    """
    path = _place(folder, name)
    opened = _Opened(path, name, config)
    yield from _records(opened, few_texts=few_texts)
    if md5 is not None and (is_md5 := opened.md5()) != md5:
        raise IntegrityError(
            f"{path} changed while it was read: expected md5 {md5}, found {is_md5}",
            hint="`ingot data pull` restores the corpus that data.dvc names; then run again",
        )


def _records(opened: _Opened, *, few_texts: bool) -> Iterator[Document | Quarantined]:
    name, config = opened.name, opened.config
    number = offset = 0
    try:
        for one in opened.rows(few_texts=few_texts):
            if isinstance(one, Row):
                number, offset = one.number, one.offset
                opened.reached = max(opened.reached, offset)
                yield _document(one, name, config, table=opened.kind in {"csv", "parquet"})
            else:
                opened.reached += len(one.text.encode()) if isinstance(one, Document) else 0
                yield one
    except expand.DamagedError as error:
        yield Quarantined(name, number + 1, offset, f"{DAMAGED_SHARD}: {error}", f"bring {name} again")


def _document(row: Row, name: str, config: PrepareConfig, *, table: bool) -> Document | Quarantined:
    try:
        found = records.document(row.fields, f"{name}:{row.number}", config.fields, table=table)
    except MalformedRecordError as error:
        return Quarantined(name, row.number, row.offset, str(error), error.do)
    if len(found.text) > config.max_line_bytes:
        do = f"prepare.max_line_bytes={len(found.text) * 4}"
        return Quarantined(name, row.number, row.offset, f"a text of more than {config.max_line_bytes} bytes", do)
    return found


def _refuse_without_documents(folder: Path, name: str, config: PrepareConfig) -> None:
    """Refuse a file of whose first records none is a document: it is most likely not what it seems."""
    bad: list[Quarantined] = []
    for record in itertools.islice(read_file(folder, name, config), _LOOK_AT):
        if isinstance(record, Document) or record.reason.startswith(DAMAGED_SHARD):
            return
        bad.append(record)
    if not bad:
        raise UnreadableError("it holds no record")
    reasons = Counter(one.reason.partition(":")[0] for one in bad)
    if len(reasons) == 1 and not bad[0].reason.startswith(TOO_LONG):
        as_text = f'prepare.formats={{"{name}"="text"}} takes it as plain text'
        do = bad[0].do or (as_text if bad[0].reason.startswith("not JSON") else "")
        first = "it holds" if len(bad) < _LOOK_AT else f"its first {_LOOK_AT} records hold"
        raise UnreadableError(f"{first} no document: {bad[0].reason}", do)


def _place(folder: Path, name: str) -> Path:
    return folder if folder.is_file() else folder / name


class _Opened:
    """One file, opened through its compressions and its encoding."""

    def __init__(self, path: Path, name: str, config: PrepareConfig) -> None:
        self._path, self.name, self.config = path, name, config
        self.reached = 0
        """Plain bytes up to the last record."""
        self._raw_bytes = self._plain_bytes = 0
        self._hasher = hashlib.md5(usedforsecurity=False)
        if any(part.startswith(".") and not part.startswith("._") for part in PurePath(name).parts):
            raise UnreadableError("a hidden file")
        self._raw = self._hashed()
        self._head, self._chunks = self._plain()
        pattern = corpus_files.first_match(name, config.formats)
        if pattern is not None:
            self.kind: str = config.formats[pattern]
        else:
            self.kind = kinds.kind(self._head, name)

    def rows(self, *, few_texts: bool) -> Iterator[formats.Found]:
        """Yield what the format finds."""
        content = formats.Content(
            self._path,
            self.name,
            self._counted(self._chunks),
            self.config.fields,
            self.config.max_line_bytes,
            self.config.max_expansion,
            few_texts=few_texts,
        )
        return formats.rows_of(self.kind)(content)

    def share(self) -> float:
        """Return about which share of the file was read, up to the last record."""
        read = self._raw_bytes * min(1.0, self.reached / max(self._plain_bytes, 1))
        return min(1.0, read / max(self._path.stat().st_size, 1))

    def _counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._plain_bytes += len(chunk)
            yield chunk

    def md5(self) -> str:
        """Return the md5 of the file's bytes, those included that reading stopped before."""
        for _ in self._raw:
            pass
        return self._hasher.hexdigest()

    def _hashed(self) -> Iterator[bytes]:
        with self._path.open("rb") as stream:
            while chunk := stream.read(READ_BYTES):
                self._hasher.update(chunk)
                self._raw_bytes += len(chunk)
                yield chunk

    def _plain(self) -> tuple[bytes, Iterator[bytes]]:
        """Return the first plain bytes, and all of them as a stream."""
        limits = expand.Limits(self.config.max_expansion, self.config.max_window_bytes)
        head, chunks = _peeked(self._raw)
        for layer in range(_LAYERS + 1):
            method = expand.compression(head)
            if method is None:
                break
            if layer == _LAYERS:
                raise UnreadableError(f"compressed more than {_LAYERS} times", "decompress it")
            head, chunks = _peeked(expand.expand(chunks, method, self.name, limits))
            if layer == 0 and head.startswith(b"PAR1"):
                raise UnreadableError(f"Parquet in {method}, of which no part can be sought", "decompress it")
        kinds.refuse_known(head, "")
        if found := kinds.encoding(head):
            head, chunks = _peeked(kinds.transcoded(chunks, found))
        return head, chunks


def _peeked(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Return the first bytes of a stream, and the whole stream; damage beyond them is met when it is read on."""
    pieces: list[bytes] = []
    size = 0
    later: list[expand.DamagedError] = []
    try:
        while size < kinds.HEAD_BYTES and (chunk := next(chunks, None)) is not None:
            pieces.append(chunk)
            size += len(chunk)
    except expand.DamagedError as error:
        if not size:
            raise
        later.append(error)
    head = b"".join(pieces)
    return head, _again(head, chunks, later)


def _again(head: bytes, chunks: Iterator[bytes], later: list[expand.DamagedError]) -> Iterator[bytes]:
    yield head
    if later:
        raise later[0]
    yield from chunks


@dataclass
class Sample:
    """The first records of a file, and how many it has."""

    documents: list[Document]
    bad: list[Quarantined]
    total: float
    """Records in the file: counted, or estimated by the share of it that was read."""
    whole: bool
    """Whether all of it was read."""


def sample(folder: Path, name: str, config: PrepareConfig, limit: int, *, few_texts: bool = True) -> Sample:
    """Read the first records of a file.

    Args:
        folder: the corpus.
        name: of the file.
        config: how it is read.
        limit: how many records.
        few_texts: see `Inspection`.

    Raises:
        UnreadableError: it cannot be read.
    """
    path = _place(folder, name)
    opened = _Opened(path, name, config)
    documents: list[Document] = []
    bad: list[Quarantined] = []
    stream = _records(opened, few_texts=few_texts)
    for record in itertools.islice(stream, limit):
        if isinstance(record, Document):
            documents.append(record)
        else:
            bad.append(record)
    share = opened.share()
    whole = next(stream, None) is None
    count = len(documents) + len(bad)
    if whole:
        return Sample(documents, bad, count, whole=True)
    if opened.kind == "parquet":
        import pyarrow.parquet as pq

        return Sample(documents, bad, pq.read_metadata(path).num_rows, whole=False)
    return Sample(documents, bad, max(count + 1, count / max(share, 1e-9)), whole=False)
