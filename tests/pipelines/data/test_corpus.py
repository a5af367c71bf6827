"""The bundled corpus: size, sources, licences, sensible documents; and the cutting that made them."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.core.program import ROOT as CHECKOUT
from pipelines.data import reader
from pipelines.data.clean import clean
from pipelines.data.records import Document


@pytest.fixture(scope="module")
def documents(corpus: Path) -> list[Document]:
    records = list(reader.read(corpus))
    assert all(isinstance(record, Document) for record in records)
    return [record for record in records if isinstance(record, Document)]


@pytest.fixture(scope="module")
def texts() -> ModuleType:
    """The module `infra/corpus/texts.py`, which is a script's neighbour and not part of a package."""
    spec = importlib.util.spec_from_file_location("corpus_texts", CHECKOUT / "infra" / "corpus" / "texts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_there_are_eight_megabytes_of_at_least_three_kinds_of_text(documents: list[Document]) -> None:
    sizes: dict[str, int] = defaultdict(int)
    for document in documents:
        sizes[document.work.split("/")[0]] += len(document.text.encode())
    assert sum(sizes.values()) >= 8_000_000
    assert {kind for kind, size in sizes.items() if size > 1_000_000} == {"shakespeare", "milton", "bible", "python"}


def test_every_document_names_a_licence_that_allows_its_use(documents: list[Document]) -> None:
    assert {document.license for document in documents} == {"CC-BY-2.5", "Public-Domain", "PSF-2.0"}
    notice = (CHECKOUT / "infra" / "corpus" / "README.md").read_text(encoding="utf-8")
    assert "Open Knowledge Foundation" in notice
    assert "Python Software Foundation" in notice


def test_no_text_carries_a_foreign_notice(documents: list[Document]) -> None:
    """Project Gutenberg's header and licence would bind the corpus to its trademark terms."""
    marked = [d.id for d in documents if re.search(r"project gutenberg|gutenberg-tm|\betext", d.text, re.IGNORECASE)]
    assert marked == []


def test_identifiers_are_unique_and_belong_to_their_work(documents: list[Document]) -> None:
    assert len({document.id for document in documents}) == len(documents)
    scenes = [document for document in documents if document.source != "milton"]
    assert [d.id for d in scenes if not d.id.startswith(d.work + "/")] == []


def test_documents_are_of_a_size_to_be_read_in_a_sitting(documents: list[Document]) -> None:
    sizes = sorted(len(document.text) for document in documents)
    assert sizes[0] >= 100
    assert sizes[-1] <= 15_000
    assert 2_000 <= sizes[len(sizes) // 2] <= 8_000


def test_cleaning_finds_an_end_of_file_mark_and_a_kelvin_sign_and_nothing_else(documents: list[Document]) -> None:
    changed = {document.id for document in documents if clean(document.text) != document.text}
    assert changed == {"milton/paradise_lost/041", "python/howto/regex/005"}


def test_the_folio_text_shares_the_work_of_its_modern_text(documents: list[Document]) -> None:
    modern = {document.work for document in documents if document.source == "shakespeare-modern"}
    folio = {document.work for document in documents if document.source == "shakespeare-folio"}
    assert len(folio) == 12
    assert folio <= modern


def test_the_bible_is_whole(documents: list[Document]) -> None:
    chapters = [document for document in documents if document.source == "bible-kjv"]
    assert len(chapters) == 1189
    assert len({chapter.work for chapter in chapters}) == 66
    verses = (re.findall(r"^\d+ ", chapter.text.split("\n", 1)[1], re.MULTILINE) for chapter in chapters)
    assert sum(map(len, verses)) == 31_102


def test_markup_is_gone_from_the_manuals_and_code_is_not(documents: list[Document]) -> None:
    manuals = "".join(document.text for document in documents if document.source == "python-docs")
    assert len(re.findall(r":(?:func|class|meth|mod|ref|term):`", manuals)) <= 1
    assert not re.search(r"^\.\. (?:index:|_[\w-]+:$)", manuals, re.MULTILINE)
    assert "    >>> " in manuals


@given(st.lists(st.text(alphabet="ab \n", min_size=1, max_size=3000), max_size=8))
def test_evening_out_loses_no_word_and_leaves_no_giant(texts: ModuleType, pieces: list[str]) -> None:
    even = texts._even(piece * 7 for piece in pieces)
    assert " ".join(even).split() == " ".join(piece * 7 for piece in pieces).split() or joins_words(pieces)
    assert "".join("".join(even).split()) == "".join("".join(piece * 7 for piece in pieces).split())


def joins_words(pieces: list[str]) -> bool:
    """Pieces that do not end in white space may be joined in the middle of a word."""
    return any(not piece[-1].isspace() for piece in pieces)


def test_a_play_is_cut_at_its_scenes_and_a_heading_stays_with_what_follows(texts: ModuleType) -> None:
    speech = "Speak the speech, I pray you, as I pronounced it.\n" * 60
    scenes = (
        f"HAMLET\n\nACT I.\n\nSCENE I. Elsinore.\n\n{speech}",
        f"SCENE II. A hall.\n\n{speech}",
        f"ACT II.\n\n{speech}",
    )
    play = "\n".join(scenes)
    pieces = texts._even(texts._cut(play, texts._ACT_OR_SCENE))
    assert [piece.split("\n")[0] for piece in pieces] == ["HAMLET", "SCENE II. A hall.", "ACT II."]


def test_a_long_piece_is_cut_at_a_blank_line(texts: ModuleType) -> None:
    paragraph = "word " * 100 + "\n\n"
    pieces = list(texts._split_large(paragraph * 90))
    assert "".join(pieces) == paragraph * 90
    assert all(len(piece) <= texts.LARGE_CHARACTERS for piece in pieces)
    assert len(pieces) == 4
    assert all(piece.endswith("\n\n") for piece in pieces)
