"""Evaluation sets: what is an item, where it comes from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.data import evaluation_items
from pipelines.data.config import EvaluationSet, PrepareConfig
from pipelines.data.evaluation_items import Items, shipped_task


def test_the_longest_string_and_other_long_ones_are_looked_for() -> None:
    items = Items()
    items.add("set", {"q": "Which of these is the largest of all?", "choices": ["a whale", "an ant"], "n": 3})
    items.add("set", {"q": "Is it so?", "context": ["one two three four five six seven eight nine"]})
    items.add("set", "too short")
    items.add("set", "\u65e5\u672c\u306e\u9996\u90fd\u306f\u3069\u3053\u3067\u3059\u304b")
    assert items.excerpts == [
        "Which of these is the largest of all?",
        "one two three four five six seven eight nine",
        "\u65e5\u672c\u306e\u9996\u90fd\u306f\u3069\u3053\u3067\u3059\u304b",
    ]
    assert items.counts == {"set": {"items": 4, "too_short": 1}}


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_every_kind_of_file_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"set{suffix}"
    texts = ["What is the first of them called?", "What is the second of them called?"]
    if suffix == ".parquet":
        from pyarrow import parquet, table

        parquet.write_table(table({"question": texts}), path)
    else:
        lines = texts if suffix == ".txt" else [json.dumps({"question": text}) for text in texts]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = PrepareConfig.model_validate({"decontaminate": [str(path)]})
    assert evaluation_items.load(config.decontaminate).excerpts == texts


def test_bytes_are_identity_and_places_are_not(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "set.txt").write_text("one two three four five\n", encoding="utf-8")
    one, two = (PrepareConfig.model_validate({"decontaminate": [str(tmp_path / n / "set.txt")]}) for n in "ab")
    assert one.identity() == two.identity()
    (tmp_path / "b" / "set.txt").write_text("another text of some words\n", encoding="utf-8")
    with pytest.raises(IntegrityError, match="no longer the file"):
        evaluation_items.load(two.decontaminate)
    changed = PrepareConfig.model_validate({"decontaminate": [str(tmp_path / "b" / "set.txt")]})
    assert changed.identity() != one.identity()


def test_what_is_no_evaluation_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not there; the name of a task has no slash"):
        EvaluationSet.model_validate(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="one of the two"):
        EvaluationSet.model_validate({})
    (tmp_path / "bad.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"bad\.jsonl, line 1 is not JSON"):
        evaluation_items.load([EvaluationSet.model_validate(str(tmp_path / "bad.jsonl"))])
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(IntegrityError, match="holds no item"):
        evaluation_items.load([EvaluationSet.model_validate(str(tmp_path / "empty.txt"))])


def test_a_task_is_found_by_name_and_an_unknown_one_is_refused() -> None:
    assert shipped_task("arc_easy", "x").name == "arc_easy.yaml"
    with pytest.raises(ConfigError, match=r"prepare\.decontaminate: arc_eazy is no task"):
        shipped_task("arc_eazy", "prepare.decontaminate")
