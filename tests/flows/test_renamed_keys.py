"""Renamed keys: an old name is refused by naming the new one, wherever it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows import recipe, renamed_keys
from pipelines.core.errors import ConfigError


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        "pretrain.stepz": "pretrain.steps",
        "compress.*.arms": "compress.*.baselines",
        "compress.*(optin).together": "compress.*.tied",
        "old_section": "new_section",
    }
    monkeypatch.setattr(renamed_keys, "KEYS", keys)
    monkeypatch.setattr(renamed_keys, "VALUES", {("prepare.tokenizer", "start"): "init_weights"})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pretrain.stepz=3", "pretrain.stepz was renamed to pretrain.steps"),
        ("compress.1.arms=3", "compress.1.arms was renamed to compress.1.baselines"),
        ("compress.arms=3", "compress.0.arms was renamed to compress.0.baselines"),
        ("prepare.tokenizer=start", "prepare.tokenizer = 'start' is called 'init_weights' now"),
        ("old_section.key=1", "old_section was renamed to new_section"),
    ],
)
def test_an_old_name_in_an_override_is_refused_with_the_new_one(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe.resolve("demo", [override])
    assert said in caught.value.message.splitlines()


def test_an_old_name_in_a_file_and_in_what_it_extends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('extends = "smoke"\n[pretrain]\nstepz = 41\n'.replace('"smoke"', '"old.toml"'))
    (tmp_path / "old.toml").write_text("[old_section]\nkey = 1\n")
    with pytest.raises(ConfigError) as caught:
        recipe.resolve(str(tmp_path / "base.toml"))
    assert caught.value.message.splitlines() == [
        "old_section was renamed to new_section",
        "pretrain.stepz was renamed to pretrain.steps",
    ]


@pytest.mark.parametrize(("method", "refused"), [("optin", True), ("gptq", False)])
def test_a_key_that_one_method_renamed_stays_good_for_the_others(method: str, refused: bool) -> None:
    table: dict[str, Any] = {"compress": [{"name": "a", "method": method, "together": 3}]}
    if refused:
        with pytest.raises(ConfigError, match=r"compress\.0\.together was renamed to compress\.0\.tied"):
            renamed_keys.refuse(table)
    else:
        renamed_keys.refuse(table)
