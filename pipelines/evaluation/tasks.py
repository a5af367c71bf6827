"""The generated tasks as lm-eval reads them: one YAML and one JSON Lines file each, in one folder.

The folder stands alone. In it,

    lm-eval run --model hf --model_args pretrained=MODEL --include_path . --tasks cloze

repeats the numbers of the artifact with the harness alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.evaluation import items
from pipelines.evaluation.config import TaskConfig
from pipelines.evaluation.items import CHOICES, Item
from pipelines.measure.heldout import Document

_VERSION = 1.0
_HEADER = (
    "# Run from this folder: lm-eval run --model hf --model_args pretrained=MODEL --include_path . --tasks {name}\n"
)
MIN_ITEMS = 2
"""A standard error needs two."""


@dataclass(frozen=True)
class Task:
    """One generated task."""

    name: str
    config: dict[str, Any]
    """What lm-eval reads; the data file is named relative to the folder."""
    items: list[Item]
    chance: float
    """Accuracy of guessing."""


def generate(config: TaskConfig, documents: Sequence[Document], family: str) -> tuple[list[Task], dict[str, str]]:
    """Return the tasks that can be made, and the reason for each that cannot."""
    tasks: list[Task] = []
    skipped: dict[str, str] = {}
    for name in config.names:
        if family == "encoder" and name != "cloze":
            skipped[name] = "an encoder restores single words; it does not continue a text"
            continue
        task = _task(name, config, documents)
        if len(task.items) < MIN_ITEMS:
            skipped[name] = f"the test split gives {len(task.items)} items; at least {MIN_ITEMS} are needed"
        else:
            tasks.append(task)
    return tasks, skipped


def write(tasks: Sequence[Task], folder: Path) -> None:
    """Write each task as NAME.yaml and NAME.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        text = _HEADER.format(name=task.name) + yaml.safe_dump(task.config, sort_keys=False, allow_unicode=True)
        (folder / f"{task.name}.yaml").write_text(text, encoding="utf-8")
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in task.items]
        (folder / f"{task.name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _task(name: str, config: TaskConfig, documents: Sequence[Document]) -> Task:
    if name == "addition":
        return Task(name, _exact(name), items.addition(config.items, config.seed), chance=0.0)
    if name == "next_line":
        generated, delimiter = items.next_line(documents, config.items, config.seed), "\n"
    elif name == "word_order":
        generated, delimiter = items.word_order(documents, config.items, config.seed), "\n"
    else:
        generated, delimiter = items.cloze(documents, config.items, config.seed), " "
    return Task(name, _multiple_choice(name, delimiter), generated, chance=1.0 / CHOICES)


def _multiple_choice(name: str, delimiter: str) -> dict[str, Any]:
    return _base(name, "multiple_choice") | {
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": delimiter,
    }


def _exact(name: str) -> dict[str, Any]:
    # For this output type, accuracy says whether greedy decoding gives the target.
    return _base(name, "loglikelihood") | {
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
    }


def _base(name: str, output_type: str) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": output_type,
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": _VERSION},
    }
