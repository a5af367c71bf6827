"""The quality classifier: learns from a reference, loses little of it, and says what it lacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.core.errors import IntegrityError
from pipelines.data.rules import registry
from pipelines.data.rules.base import Page, Rule
from pipelines.data.rules.quality import train
from pipelines.data.shingles import units_of
from tests.bench.planted_corpus import Maker


def texts(seed: int, count: int) -> list[str]:
    maker = Maker(seed)
    return [maker.text("en", maker.sentences("en", 12)) for _ in range(count)]


def made(folder: Path, count: int = 300) -> Rule:
    path = folder / "good.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(1, count)), encoding="utf-8")
    return registry.make((registry.settings({"name": "quality", "reference": str(path)}, "0", None),), folder)[0]


def dropped(rule: Rule, found: list[str]) -> float:
    return float(np.mean([rule.reason(Page(text, units_of(text))) is not None for text in found]))


def test_junk_of_a_corpus_is_told_from_what_is_like_the_reference(tmp_path: Path) -> None:
    """The other side is a sample of the corpus itself, two thirds of it good, none lost for being in it."""
    rule = made(tmp_path)
    maker = Maker(5)
    good, junk = texts(2, 200), [maker.junk(kind) for kind in ("gibberish", "lorem") for _ in range(50)]
    rule.fit([*good, *junk])
    assert dropped(rule, junk) >= 0.95
    assert dropped(rule, good) <= 0.05
    assert dropped(rule, texts(3, 200)) <= 0.05


def test_too_few_texts_are_refused_and_no_reference_too(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="has 20 good and 3 other texts; it needs 50 of each"):
        made(tmp_path, 20).fit(texts(2, 3))
    with pytest.raises(ValueError, match="give it a `reference`"):
        registry.settings({"name": "quality"}, "0", None)


def test_training_is_the_same_twice() -> None:
    sides = [[np.arange(n, n + 5) for n in range(start, start + 40)] for start in (0, 100)]
    (one, bias), (two, other) = train(*sides, seed=1), train(*sides, seed=1)
    assert (one.tobytes(), bias) == (two.tobytes(), other)
