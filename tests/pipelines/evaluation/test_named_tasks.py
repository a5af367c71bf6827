"""Tasks that a recipe names: of lm-eval with data from here, and files of one's own; what guessing explains is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.core.stage import StageContext
from pipelines.evaluation import named_tasks, stage
from pipelines.evaluation.config import EvaluateConfig, HarnessTask
from pipelines.measure.intervals import proportion

OWN = """\
task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: mine.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - metric: acc
"""
ITEMS = [{"text": f"The statement {n} is", "choices": ["a statement", "zzxqj qqq"], "label": 0} for n in range(40)]


def write_items(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A task file with its data beside it."""
    write_items(tmp_path / "mine" / "mine.jsonl", ITEMS)
    (tmp_path / "mine" / "mine.yaml").write_text(OWN)
    return tmp_path / "mine" / "mine.yaml"


@pytest.fixture
def arc(tmp_path: Path) -> Path:
    """Data in the form of ARC: what `arc_easy` downloads otherwise."""
    options = {"text": ["a word", "a name", "a class", "a value"], "label": ["A", "B", "C", "D"]}
    rows = [
        {"id": str(n), "question": f"What is {n}?", "choices": options, "answerKey": "ABCD"[n % 4]} for n in range(32)
    ]
    for split in ("train", "validation", "test"):
        write_items(tmp_path / "arc" / f"{split}.jsonl", rows)
    return tmp_path / "arc"


@pytest.fixture
def evaluated(
    prepared: Artifact,
    decoder_artifact: Artifact,
    context: StageContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., dict[str, Any]]:
    """Return a function that evaluates the small decoder on tasks, without a network."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    def run(*tasks: dict[str, Any]) -> dict[str, Any]:
        table = {"tasks": {"names": [], "lm_eval": list(tasks)}, "baselines": [], "max_documents": 2}
        config = EvaluateConfig.model_validate(table | {"probes": {"latency": {"enabled": False}}})
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        stage.run(config, {"prepare": prepared, "model": decoder_artifact}, out, context)
        outcomes = json.loads((out / "task_outcomes.json").read_text())
        return json.loads((out / "evaluation.json").read_text()) | {"outcomes": outcomes}

    return run


def test_a_file_of_ones_own_runs_with_its_data_examples_and_limit(
    evaluated: Callable[..., dict[str, Any]], own: Path, arc: Path
) -> None:
    measured = evaluated({"file": str(own), "limit": 30}, {"name": "arc_easy", "data": str(arc), "fewshot": 2})
    mine, standard = measured["tasks"]["mine"], measured["tasks"]["arc_easy"]
    assert (mine["n"], mine["chance"], mine["accuracy"]) == (30, 0.5, 1.0)
    assert mine["informative"]
    assert (standard["n"], standard["chance"]) == (32, 0.25)
    assert standard["low"] <= 0.25 <= standard["high"], "the answers have no reason"
    assert not standard["informative"]
    assert sum(measured["outcomes"]["arc_easy"]) == round(32 * standard["accuracy"])
    other = evaluated({"name": "arc_easy", "data": str(arc)})["tasks"]["arc_easy"]
    assert other["hash"] != standard["hash"], "two examples stand before each item"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "arc_esay"}, "arc_esay is no task that comes with lm-eval"),
        ({"name": "mmlu"}, "mmlu is a group, not a single task"),
        ({"name": "arc_easy"}, "arc_easy cannot be loaded"),
    ],
)
def test_a_task_that_cannot_run_is_refused_with_what_to_do(
    task: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "none")
    with pytest.raises(ConfigError, match=message) as caught:
        named_tasks.load(HarnessTask(**task), tmp_path)
    assert caught.value.hint


def test_a_task_without_right_answers_is_refused_by_its_metrics(own: Path, evaluated: Callable[..., Any]) -> None:
    own.write_text(OWN.replace("metric: acc", "metric: brier_score"))
    with pytest.raises(ConfigError, match="mine measures brier_score"):
        evaluated({"file": str(own)})


def test_what_a_tasks_files_hold_is_identity_and_where_they_lie_is_not(own: Path, tmp_path: Path) -> None:
    def identity(file: Path) -> Any:
        return EvaluateConfig.model_validate({"tasks": {"lm_eval": [{"file": str(file)}]}}).identity()

    before = identity(own)
    moved = own.parent.rename(tmp_path / "elsewhere") / own.name
    assert identity(moved) == before
    planned = HarnessTask.model_validate({"file": str(moved)})
    write_items(moved.parent / "mine.jsonl", ITEMS[:-1])
    assert identity(moved) != before
    with pytest.raises(IntegrityError, match="the files of the task mine changed"):
        named_tasks.load(planned, tmp_path)
    with pytest.raises(ValidationError, match="expected"):
        HarnessTask.model_validate(planned.model_dump())


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([{}], "a task has a name"),
        ([{"file": "nowhere.yaml"}], "nowhere.yaml is not there"),
        ([{"name": "arc_easy", "data": "nowhere"}], "nowhere is not a folder"),
        ([{"name": "cloze"}], "two tasks are called cloze"),
    ],
)
def test_tasks_that_name_nothing_are_refused(tables: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluateConfig.model_validate({"tasks": {"lm_eval": tables}})


@pytest.mark.parametrize(
    ("right", "items", "low", "high"), [(0, 64, 0.0, 0.0566), (16, 64, 0.1602, 0.3682), (64, 64, 0.9434, 1.0)]
)
def test_the_interval_of_a_share_is_wilsons(right: int, items: int, low: float, high: float) -> None:
    interval = proportion(right, items)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))
