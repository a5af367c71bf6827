"""What every rule keeps to, whichever it is: the registry finds it, and this file asks the same of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.config import PrepareConfig
from pipelines.data.rules import registry
from pipelines.data.rules.base import Page, Rule
from pipelines.data.shingles import units_of
from tests.bench.planted_corpus import LEXICONS, Maker

TEXTS = [
    maker.text(language, maker.sentences(language, 12))
    for maker in (Maker(7),)
    for language in LEXICONS
    for _ in range(10)
]


@pytest.fixture
def table(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """What each rule that needs a setting is told."""
    reference = tmp_path / "reference.jsonl"
    maker = Maker(1)
    texts = [maker.text(one, maker.sentences(one, 12)) for one in LEXICONS for _ in range(12)]
    reference.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    bad = tmp_path / "bad.txt"
    bad.write_text("".join(maker.junk("gibberish") + "\n" for _ in range(60)), encoding="utf-8")
    return {
        "gopher": {"stop_words": []},
        "language": {"keep": list(LEXICONS)},
        "quality": {"reference": str(reference), "against": str(bad)},
    }


def made(name: str, table: dict[str, dict[str, Any]], folder: Path, **more: Any) -> Rule:
    rule = registry.make((registry.settings({"name": name, **table.get(name, {}), **more}, "0", None),), folder)[0]
    if rule.learns:
        rule.fit(TEXTS)
    return rule


@pytest.mark.parametrize("name", registry.names())
def test_clean_text_of_every_language_stays(name: str, table: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    rule = made(name, table, tmp_path)
    assert [rule.reason(Page(text, units_of(text))) for text in TEXTS] == [None] * len(TEXTS)


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("text", ["", " ", "\n", "x", "\u0e01", "...", "\U0001f600" * 50])
def test_no_text_is_too_odd_to_be_judged(
    name: str, text: str, table: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    rule = made(name, table, tmp_path)
    found = rule.reason(Page(text, units_of(text)))
    assert found is None or 0 < len(found) < 60


@pytest.mark.parametrize("name", registry.names())
def test_it_is_asked_for_its_sources_alone(name: str, table: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    rule = made(name, table, tmp_path, sources=["web-*", "code"])
    assert [rule.concerns(source) for source in ("web-en", "code", "books", "web")] == [True, True, False, False]
    assert made(name, table, tmp_path).concerns("anything")


@pytest.mark.parametrize("name", registry.names())
def test_every_setting_is_described_and_the_recipe_survives_a_round_trip(
    name: str, table: dict[str, dict[str, Any]]
) -> None:
    assert all(field.description for field in registry.get(name).Config.model_fields.values())
    config = PrepareConfig.model_validate({"rules": [{"name": name, **table.get(name, {})}]})
    again = PrepareConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again.identity() == config.identity()
    with pytest.raises(ValueError, match="not a key"):
        PrepareConfig.model_validate({"rules": [{"name": name, "no_such_key": 1, **table.get(name, {})}]})
