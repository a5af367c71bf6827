"""Tasks that a recipe names: those that come with lm-eval, and YAML files of the user's, with data from here."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import yaml
from datasets.exceptions import DatasetsError
from lm_eval.tasks import TaskManager

from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.data.evaluation_items import shipped_task
from pipelines.evaluation.config import HarnessTask

_METRICS = ("acc", "exact_match", "acc_norm")
"""What says of one item whether the answer is right, the first that a task has."""
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""Ending of a data file -> the reader of `datasets`."""


def load(task: HarnessTask, scratch: Path) -> Any:
    """Return a task as `lm_eval.evaluator.evaluate` takes it.

    A YAML file in `scratch` includes the task's own and lays the recipe's settings over it, as lm-eval provides for.

    Raises:
        ConfigError: there is no such task, or its data cannot be had.
        IntegrityError: its files are no longer those that the run was planned with.
    """
    _check_unchanged(task)
    own = Path(task.file) if task.file else shipped_task(task.name, "evaluate.tasks.lm_eval")
    settings: dict[str, Any] = {"include": str(own), "task": task.name}
    if task.fewshot is not None:
        settings["num_fewshot"] = task.fewshot
    if task.data:
        settings |= _data(task, scratch)
    place = scratch / f"{task.name}.yaml"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(yaml.safe_dump(settings), encoding="utf-8")
    try:
        with contextlib.chdir(own.parent):  # where the data files that a YAML file names are
            return TaskManager(include_defaults=False).load([str(place)])
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise ConfigError(
            f"evaluate.tasks.lm_eval: {task.name} cannot be loaded: {error}",
            hint="without a network give `data`: a folder with SPLIT.jsonl or SPLIT.parquet for each of its splits",
        ) from error


def first(loaded: Any, task: HarnessTask) -> list[int]:
    """Return the numbers of the items within the task's limit."""
    return list(range(min(task.limit or 0, len(loaded["tasks"][task.name].eval_docs))))


def answers(name: str, results: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Return the key of a task's accuracy in its row of results, and the items behind it, in order.

    Raises:
        ConfigError: the task does not say of an item whether the answer is right.
    """
    row = results["results"][name]
    key = next((key for metric in _METRICS for key in row if key.partition(",")[0] == metric), None)
    if key is None:
        measured = ", ".join(sorted(key.partition(",")[0] for key in row if "," in key and "_stderr" not in key))
        raise ConfigError(
            f"evaluate.tasks.lm_eval: {name} measures {measured}; Ingot compares right answers ({', '.join(_METRICS)})",
            hint="leave the task out, or give it one of these metrics in a file of your own that includes it",
        )
    used = key.partition(",")[2]
    samples = [sample for sample in results["samples"][name] if sample.get("filter", used) == used]
    return key, sorted(samples, key=lambda sample: sample["doc_id"])


def _check_unchanged(task: HarnessTask) -> None:
    again = HarnessTask.model_validate({**task.model_dump(), "sha256": ""})
    if again.sha256 != task.sha256:
        raise IntegrityError(
            f"the files of the task {task.name} changed since the run was planned: sha256 {again.sha256}, planned with "
            f"{task.sha256}",
            hint="run again",
        )


def _data(task: HarnessTask, scratch: Path) -> dict[str, Any]:
    files = {path.stem: path for path in sorted(Path(task.data).iterdir()) if path.suffix in _READERS}
    readers = {_READERS[path.suffix] for path in files.values()}
    if len(readers) != 1:
        raise ConfigError(
            f"evaluate.tasks.lm_eval: {task.data} holds {'no data' if not readers else 'data of several kinds'}",
            hint="one file a split, all .jsonl or all .parquet, for instance test.jsonl",
        )
    data_files = {split: str(path) for split, path in files.items()}
    return {
        "dataset_path": readers.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": data_files, "cache_dir": str(scratch / "datasets")},
    }
