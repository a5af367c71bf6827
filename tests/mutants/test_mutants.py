"""Every mutant fits the tree as it is: its text stands there once, what it becomes is a program, its tests exist."""

from __future__ import annotations

import ast
import re
from collections import Counter

import pytest

from tests.mutants.run import ROOT, mutants

ALL = mutants()


@pytest.mark.parametrize("area", sorted({mutant.area for mutant in ALL}))
def test_mutants_fit_the_tree(area: str) -> None:
    for mutant in (each for each in ALL if each.area == area):
        text = (ROOT / mutant.file).read_text()
        assert text.count(mutant.old) == 1, f"{area}.toml, {mutant.bug!r}: change `old` with {mutant.file}"
        ast.parse(text.replace(mutant.old, mutant.new), mutant.file)
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert (ROOT / file).is_file(), f"{mutant.bug!r}: there is no {file}"
            assert not name or re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), test


def test_no_two_mutants_are_one() -> None:
    counted = Counter((mutant.file, mutant.old, mutant.new) for mutant in ALL)
    assert [each for each, count in counted.items() if count > 1] == []
