"""What a file is, told by its first bytes; its name only decides where the bytes leave a choice."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import PurePath

from pipelines.data.expand import DamagedError

HEAD_BYTES = 1 << 16
"""Plain bytes that are looked at."""
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json")
_TABLE_SUFFIXES = (".csv", ".tsv", ".tab", ".psv")
_COMPRESSED_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz", ".lzma")
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NAMED = (
    (b"\x00\x05\x16\x07", "an AppleDouble file, as macOS leaves them on other disks", "`find . -name '._*' -delete`"),
    (b"version https://git-lfs.github.com/spec/", "a git-lfs pointer: the file itself is not here", "`git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer: the file itself is not here", "`git annex get`"),
    (b"outs:\n- md5:", "a pointer of DVC: the file itself is not here", "`dvc pull`"),
    (b"PK\x03\x04", "a ZIP archive (or an Office document)", "unpack it"),
    (b"PK\x05\x06", "an empty ZIP archive", ""),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it"),
    (b"%PDF-", "a PDF", "extract its text (`pdftotext`)"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "`lz4 -d`, then zstd or gzip"),
    (b"\x1f\x9d", "compressed with compress (.Z)", "`gzip -d`"),
    (b"\xff\x06\x00\x00sNaPpY", "compressed with snappy", "decompress it"),
    (b"ARROW1\x00\x00", "an Arrow file", "write it as Parquet: `Dataset.to_parquet`"),
    (b"\xff\xff\xff\xff", "an Arrow stream, as `Dataset.save_to_disk` writes it", "`Dataset.to_parquet`"),
    (b"FEA1", "a Feather file", "write it as Parquet"),
    (b"Obj\x01", "an Avro file", "write it as Parquet"),
    (b"\x89HDF", "an HDF5 file", "write it as Parquet"),
    (b"SQLite format 3\x00", "an SQLite database", "export the table as CSV"),
    (b"\x89PNG", "a picture", ""),
    (b"\xff\xd8\xff", "a picture", ""),
    (b"GIF8", "a picture", ""),
    (b"\x80\x04\x95", "a pickle, which may run code", "write it as JSON Lines"),
    (b"PGDMP", "a dump of PostgreSQL", "export the table as CSV"),
)
_MARKUP = re.compile(rb"\s*(<!--.*?-->\s*)*<(!doctype|html|head|body|\?xml)\b.{,80}", re.IGNORECASE | re.DOTALL)
_WARC = re.compile(rb"WARC/\d")
ICONV = "`iconv -f ENCODING -t UTF-8 FILE` converts it, where ENCODING is LATIN1, CP1252, SHIFT_JIS, ..."
_CONTROLS = frozenset(range(32)) - {9, 10, 11, 12, 13, 27}


class UnreadableError(ValueError):
    """A file that is not read.

    Args:
        reason: what it is.
        do: what makes something readable of it.
    """

    def __init__(self, reason: str, do: str = "") -> None:
        super().__init__(reason)
        self.do = do


def plain_name(name: str) -> str:
    """Return a file's name in lower case, without the suffixes of compression."""
    path = PurePath(name.lower())
    while path.suffix in _COMPRESSED_SUFFIXES:
        path = path.with_suffix("")
    return path.name


def encoding(head: bytes) -> str | None:
    """Return `utf-16` or `utf-32` (with the byte order, where no mark tells it); None for everything else."""
    for mark, name in _BOMS:
        if head.startswith(mark):
            return name
    sample = head[: 4096 & ~3]
    if len(sample) < 16:
        return None
    for name, zeros in (
        ("utf-32-le", (1, 2, 3)),
        ("utf-32-be", (0, 1, 2)),
        ("utf-16-le", (1,)),
        ("utf-16-be", (0,)),
    ):
        width = 4 if "32" in name else 2
        columns = [sample[offset::width] for offset in range(width)]
        rest = [column for offset, column in enumerate(columns) if offset not in zeros]
        empty = all(columns[o].count(0) > 0.6 * len(columns[o]) for o in zeros)
        if empty and not any(column.count(0) > 0.02 * len(column) for column in rest) and _is_text(sample, name):
            return name
    return None


def _is_text(sample: bytes, name: str) -> bool:
    try:
        text = codecs.getincrementaldecoder(name)().decode(sample)
    except UnicodeDecodeError:
        return False
    return not any(ord(character) in _CONTROLS for character in text)


def transcoded(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Yield text of an encoding as UTF-8.

    Raises:
        DamagedError: it is not text in that encoding to its end.
    """
    decoder = codecs.getincrementaldecoder(name)()
    try:
        for chunk in chunks:
            yield decoder.decode(chunk).encode("utf-8")
        yield decoder.decode(b"", final=True).encode("utf-8")
    except UnicodeError as error:
        raise DamagedError(f"not {name.upper()} to its end: {error}") from None


def kind(head: bytes, name: str) -> str:
    """Return the format of a file: jsonl, json, csv, parquet, warc or text.

    Args:
        head: its first plain bytes, `HEAD_BYTES` of them or all, in UTF-8 if it is text.
        name: relative to the corpus.

    Raises:
        UnreadableError: it is none of these; the reason says what it is.
    """
    suffix = PurePath(plain_name(name)).suffix
    if not head.strip():
        raise UnreadableError("empty" if not head else "blank: only spaces and line ends")
    if not head.strip(b"\0"):
        raise UnreadableError("NUL bytes alone: its content never arrived", "bring it again")
    if head.startswith(b"PAR1"):
        return "parquet"
    if _WARC.match(head):
        return "warc"
    refuse_known(head, suffix)
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if found := _json(start, suffix):
        return found
    if markup := _MARKUP.match(start):
        if b"html" in markup.group().lower() or markup.group(2).lower() in {b"head", b"body"}:
            do = f'prepare.formats={{"{name}"="html"}} reads the text of a page'
            raise UnreadableError("an HTML page, perhaps the answer of a server in place of the file", do)
        raise UnreadableError(
            "XML, perhaps the answer of a server in place of the file",
            f'extract its text; prepare.formats={{"{name}"="text"}} takes it with its marks',
        )
    if suffix in (*_JSON_SUFFIXES, *_TABLE_SUFFIXES) and re.match(rb"<[a-zA-Z]", start):
        raise UnreadableError("markup, perhaps the answer of a server in place of the file", "bring it again")
    if suffix in _JSON_SUFFIXES:
        return "jsonl"
    _refuse_binary(head)
    return "csv" if suffix in _TABLE_SUFFIXES else "text"


def refuse_known(head: bytes, suffix: str) -> None:
    """Refuse what is known not to be text or a table by its first bytes, and says what it is.

    Raises:
        UnreadableError: it is.
    """
    if head[257:262] == b"ustar":
        raise UnreadableError("a tar archive", "unpack it")
    for magic, what, do in _NAMED:
        if head.startswith(magic):
            raise UnreadableError(what, do)
    if suffix == ".parquet":
        raise UnreadableError("named Parquet, but not Parquet", "")


def _json(start: bytes, suffix: str) -> str | None:
    """Return jsonl or json for a text that begins with a JSON object or an array of objects."""
    if start.startswith(b"["):
        inner = start[1:].lstrip()
        if inner.startswith((b"{", b"[")) or (suffix == ".json" and not inner.startswith(b"#")):
            return "json" if inner.startswith(b"{") or suffix in _JSON_SUFFIXES else None
        return None
    if not start.startswith(b"{"):
        return None
    first, newline, rest = start.replace(b"\r", b"\n").partition(b"\n")
    try:
        return "jsonl" if isinstance(json.loads(first), dict) else None
    except (ValueError, RecursionError):
        pass
    following = rest.lstrip()
    pretty = newline and first.rstrip().endswith((b"{", b",", b"[", b":")) and not following.startswith(b"{")
    if pretty and following.startswith((b'"', b"}", b"]")):
        return "json"
    return "jsonl" if suffix in _JSON_SUFFIXES or (not newline and start.startswith(b'{"')) else None


def _refuse_binary(head: bytes) -> None:
    controls = sum(byte in _CONTROLS for byte in head[:4096])
    if b"\0" in head or controls > len(head[:4096]) // 20:
        raise UnreadableError("binary: NUL or control bytes, no text")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < HEAD_BYTES)
    except UnicodeDecodeError as error:
        raise UnreadableError(f"not UTF-8: byte {error.start}", ICONV) from None
