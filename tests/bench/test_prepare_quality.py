"""The planted corpus, small: what the preparation finds of it with its default settings, and what it loses."""

from __future__ import annotations

from pathlib import Path

from tests.bench.planted_corpus import make
from tests.bench.prepare_quality import run


def test_what_was_planted_is_found_and_what_is_clean_stays(tmp_path: Path) -> None:
    found, _ = run(make(700, seed=5), tmp_path)
    assert found["junk kept"] <= 0.05, found
    assert found["unique lost"] <= 0.005, found
    assert found["unique cut"] <= 0.005, found
    assert min(found["near recall"].values()) >= 0.95, found
    assert min(found["verbatim recall"].values()) == 1.0, found
    assert found["edited recall"]["all"] >= 0.95, found
    assert found["13-word runs left"] == 0.0
