"""The items of evaluation sets that training text must not hold: from files, or from the tasks of lm-eval by name.

An item is a record (a line of text, a line of JSON, a row). Its strings are looked for each by itself, so that it is
found however a page lays question and answers out: the longest string, and every other one of at least eight words.
A string of less than four words (eight Chinese characters) says nothing and is left out, and counted.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.core import fingerprint
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.data.config import EvaluationSet
from pipelines.data.shingles import Units, units_of

LEAST_WORDS = 4
"""Words of the shortest item that is looked for."""
_TELLING_WORDS = 8
"""Words from which every string of an item is looked for, not only its longest."""
_SHOWN = 200


@dataclass
class Items:
    """The strings that are looked for."""

    sets: list[str] = field(default_factory=list)
    """Set of each string."""
    units: list[Units] = field(default_factory=list)
    excerpts: list[str] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Set -> records read, and records of which no string is long enough."""

    def add(self, name: str, record: Any) -> None:
        """Take the strings of one record."""
        count = self.counts.setdefault(name, {"items": 0, "too_short": 0})
        count["items"] += 1
        found = [(length_in_words(units), text, units) for text in strings(record) for units in (units_of(text),)]
        found.sort(key=lambda each: -each[0])
        chosen = [each for n, each in enumerate(found) if each[0] >= (_TELLING_WORDS if n else LEAST_WORDS)]
        count["too_short"] += not chosen
        for _, text, units in chosen:
            self.sets.append(name)
            self.units.append(units)
            self.excerpts.append(text[:_SHOWN])


def length_in_words(units: Units) -> float:
    """Return the length of a text in words; see `clean.weight`."""
    return len(units.hashes) if units.quarters is None else float(units.quarters.sum()) / 4


def strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from strings(each)


def load(sets: Iterable[EvaluationSet]) -> Items:
    """Return the items of all sets.

    Raises:
        ConfigError: a task that is unknown or cannot be loaded.
        IntegrityError: a file that is no longer the one that the run was planned with, or that holds no item.
    """
    items = Items()
    for one in sets:
        for record in _records(one):
            items.add(one.label, record)
        if not items.counts.get(one.label):
            raise IntegrityError(f"prepare.decontaminate: {one.label} holds no item", hint="name another file or task")
    return items


def _records(one: EvaluationSet) -> Iterator[Any]:
    if not one.file:
        yield from _task_records(one.task)
        return
    path = Path(one.file)
    if not path.is_file() or fingerprint.hash_file(path) != one.sha256:
        raise IntegrityError(
            f"prepare.decontaminate: {path} is no longer the file that the run was planned with", hint="run again"
        )
    if path.suffix == ".parquet":
        from pyarrow import parquet

        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield _json(line, path, number) if path.suffix == ".jsonl" else line


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise IntegrityError(
            f"prepare.decontaminate: {path}, line {number} is not JSON: {error.msg}", hint="repair the line"
        ) from None


def _task_records(name: str) -> Iterator[Any]:
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    path = shipped_task(name, "prepare.decontaminate")
    try:
        with contextlib.chdir(path.parent):
            task = TaskManager(include_defaults=False).load([str(path)])["tasks"][name]
        yield from task.eval_docs
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise ConfigError(
            f"prepare.decontaminate: the items of {name} cannot be loaded: {error}",
            hint="without a network give a file of its items: .jsonl, .parquet or .txt",
        ) from error


def shipped_task(name: str, setting: str) -> Path:
    """Return the YAML file of a task that comes with lm-eval.

    Its own index parses thousands of files, which takes ten seconds; reading them does not.

    Args:
        name: of the task.
        setting: that names it, for the message.

    Raises:
        ConfigError: there is no such task.
    """
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    line = re.compile(rf"^(task|group): *{re.escape(name)} *$".encode(), re.MULTILINE)
    kinds: set[bytes] = set()
    for path in (*sorted(root.rglob(f"{name}.yaml")), *sorted(root.rglob("*.yaml"))):
        if (match := line.search(path.read_bytes())) is not None:
            if match[1] == b"task":
                return path
            kinds.add(match[1])
    what = "a group, not a single task" if kinds else "no task that comes with lm-eval"
    raise ConfigError(f"{setting}: {name} is {what}", hint="`lm-eval ls tasks` lists them; or give a file")
