"""README and results show the numbers and pictures of one run: those that infra/pictures/run.json was written with."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import re
import sys
from types import ModuleType
from typing import Any

import pytest

from pipelines.core.errors import ConfigError
from tests.docs.pages import CHECKOUT

PICTURES = CHECKOUT / "infra" / "pictures"
LARGEST_BYTES = 250_000


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that writes the tables."""
    monkeypatch.setattr(sys, "path", [str(CHECKOUT), *sys.path])
    return importlib.import_module("infra.pictures.tables")


@pytest.fixture
def facts() -> dict[str, Any]:
    """The numbers of the run."""
    told: dict[str, Any] = json.loads((PICTURES / "run.json").read_text(encoding="utf-8"))
    return told


def test_the_tables_say_what_the_run_said(tables: ModuleType, facts: dict[str, Any]) -> None:
    assert tables.differences(facts) == [], "run `make pictures` after a run of the demo"


def test_a_page_with_another_number_is_found_out(tables: ModuleType, facts: dict[str, Any]) -> None:
    other = copy.deepcopy(facts)
    other["summaries"]["pretrain"]["validation_loss"] += 0.01
    other["models"][1]["ratio"] = 1.5
    assert [line.split()[0] for line in tables.differences(other)] == ["README.md", "docs/results/demo.md"]


def test_a_stage_that_the_run_does_not_have_is_refused(tables: ModuleType, facts: dict[str, Any]) -> None:
    del facts["summaries"]["pretrain"]
    with pytest.raises(ConfigError, match=r"README\.md shows pretrain"):
        tables.differences(facts)


def test_the_pictures_are_those_of_the_run_and_small(facts: dict[str, Any]) -> None:
    found = {name: hashlib.sha256((PICTURES / name).read_bytes()).hexdigest() for name in facts["pictures"]}
    assert found == facts["pictures"]
    assert {
        path.name: path.stat().st_size for path in PICTURES.glob("*.png") if path.stat().st_size > LARGEST_BYTES
    } == {}


def test_every_picture_is_shown_on_a_page() -> None:
    pages = [CHECKOUT / "README.md", *(CHECKOUT / "docs").rglob("*.md")]
    shown = {name for page in pages for name in re.findall(r"pictures/([\w-]+\.png)", page.read_text(encoding="utf-8"))}
    assert {path.name for path in PICTURES.glob("*.png")} == shown
