"""Records of runs: `.ingot/runs/<run id>/run.json`, written as the run goes on, read by status, show and resume."""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
import functools
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, field_validator, model_validator

from flows import console
from pipelines.core.errors import ConfigError, IntegrityError, LockedError, TransientError
from pipelines.core.processes import ProcessName, this_process
from pipelines.core.redaction import HIDDEN, redact, redact_override, redact_value
from pipelines.core.stage import base_name
from pipelines.core.store import open_store

RECORD = "run.json"
REPORT = "report.html"
PARETO = "pareto.json"
"""Every variant by method and bits, as rows: what the report shows of compression."""

_AT_WORK: dict[Path, contextlib.ExitStack] = {}
"""The locks of the runs that this process executes, by the folder of the run."""
_TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"
_CAME_TO_ITS_END = ("done", "refused")
"""A run that the gate refused has done all there was to do; running it again would only refuse again."""


class NodeRecord(BaseModel):
    """One node of a run."""

    stage: str
    fingerprint: str
    resume_key: str = ""
    """What its unfinished work is found by."""
    state: str = "waits"
    """waits, running, cached, done, failed."""
    message: str = ""
    seconds: float | None = None
    done: int = 0
    total: int = 0
    summary: dict[str, Any] = Field(default_factory=dict)
    artifact: str | None = None

    @model_validator(mode="after")
    def _bits_per_byte_alone_are_of_the_test_split(self) -> NodeRecord:
        """Older versions called what training measures on validation text by the same name."""
        if self.stage == "pretrain" and "bits_per_byte" in self.summary:
            self.summary["validation_bits_per_byte"] = self.summary.pop("bits_per_byte")
        return self


class _Ratio(BaseModel):
    value: float


class _Baseline(BaseModel):
    ratio: _Ratio


class _Variant(BaseModel):
    """What is shown of a row of `PARETO`, which has more."""

    model: str
    method: str
    bits_per_weight: float | None
    bits_per_cached_number: float | None = None
    size_bytes: float
    footprint_bytes: float = 0.0
    cache_tokens: int = 0
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    best: bool
    baselines: dict[str, _Baseline]


class SelectionRecord(BaseModel):
    """Which nodes a run was asked for; see `flows.planner.Selection`."""

    only: str | None = None
    since: str | None = None
    force: list[str] = Field(default_factory=list)
    finished: list[str] = Field(default_factory=list)
    keep_going: bool = False


class RunRecord(BaseModel):
    """One execution of the graph."""

    id: str
    recipe: str
    overrides: list[str]
    """Without secrets, like `settings` and `config`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The recipe with everything that it extends and all overrides: what was set, and nothing else."""
    config: dict[str, Any]
    """Every setting that was in force, defaults too."""
    selection: SelectionRecord | None = None
    """None in a record of an older version, which kept neither this nor `settings`."""
    project: str | None = None
    """Root of the project whose corpus it reads; None in a record of an older version."""
    data_hash: str
    status: str = "running"
    """running, done, refused, preempted, failed."""
    started_at: str
    finished_at: str | None = None
    exit_code: int | None = None
    error: str | None = None
    process: ProcessName | None = None
    """Who executes it, for messages. Whether it still does is told by the run's lock."""
    nodes: dict[str, NodeRecord]
    init_weights: str | None = None
    """What `base.from` led to when the run began; an alias may name other weights by now."""
    tracking_url: str | None = None
    tracking_uri: str | None = None
    """Where MLflow is, without secrets."""
    tracking_pending: bool = False
    """Whether MLflow lacks a part of this run; `ingot sync` sends it."""
    tracking_problem: str | None = None
    folder: Path | None = Field(default=None, exclude=True)
    """Where its record lies."""

    @field_validator("started_at", "finished_at")
    @classmethod
    def _is_a_time(cls, value: str | None) -> str | None:
        if value is not None:
            dt.datetime.fromisoformat(value)
        return value

    def pin(self, overrides: list[str]) -> list[str]:
        """Return overrides that start from the same weights as this run, wherever the aliases point by now."""
        pinned = f"base.from={self.init_weights}"
        return overrides if self.init_weights is None or pinned in overrides else [*overrides, pinned]

    @property
    def trained(self) -> str | None:
        """Fingerprint of its pretraining; None for a run without any."""
        return self.nodes["pretrain"].fingerprint if "pretrain" in self.nodes else None

    def promoted(self, model: str) -> str | None:
        """Return the version of a registered model that this run made champion; None for none."""
        summaries = [node.summary for node in self.nodes.values() if node.stage == "promote"]
        return next((str(s["version"]) for s in summaries if s.get("model") == model and "version" in s), None)

    def table(self, *, full: bool) -> dict[str, Any]:
        """Return the settings of this run, with the weights that it began with, wherever the aliases point by now.

        Args:
            full: every setting that was in force; else those that were set.

        Raises:
            ConfigError: one of them held a secret, which no record keeps.
        """
        kept = self.config if full or self.selection is None else self.settings
        table = copy.deepcopy(kept)
        table.pop("store", None)  # it is the one that this record lies in, wherever that is mounted by now
        if self.init_weights is not None:
            table.setdefault("base", {})["from"] = self.init_weights
        if os.environ.get(_TRACKING_VARIABLE) and HIDDEN in (table.get("tracking", {}).get("uri") or ""):
            del table["tracking"]["uri"]
        if lost := list(_hidden(table)):
            raise ConfigError(
                f"{', '.join(lost)} of run {self.id} held a secret, which no record keeps",
                hint="give the whole command of that run again"
                + (f", or set ${_TRACKING_VARIABLE}" if lost == ["tracking.uri"] else ""),
            )
        return table

    @property
    def at_work(self) -> bool:
        """Whether a process executes it at this moment, on this machine or another."""
        if self.status != "running" or self.folder is None:
            return False
        return not open_store(self.folder.parents[1]).is_free(_lock_of(self.id))

    @property
    def state(self) -> str:
        """The status, or `killed` where a run that says it is running has lost its process."""
        return "killed" if self.status == "running" and not self.at_work else self.status

    @property
    def seconds(self) -> float | None:
        """How long it has taken, or took; of one that was killed, until its last sign of life."""
        if self.finished_at is not None:
            end = dt.datetime.fromisoformat(self.finished_at).timestamp()
        elif self.folder is not None and not self.at_work:
            end = open_store(self.folder.parents[1]).modified(f"runs/{self.id}/{RECORD}") or time.time()
        else:
            end = time.time()
        return max(0.0, end - dt.datetime.fromisoformat(self.started_at).timestamp())

    @property
    def result(self) -> str | None:
        """The headline number: bits per byte of the promoted model, else of the base model, as far as it came."""
        summaries = {name: node.summary for name, node in self.nodes.items()}
        promoted = summaries.get("promote", {})
        if "bits_per_byte" in promoted:
            name = promoted["candidate"]
            mark = _mark(summaries.get(f"evaluate.{name}", {}))
            return f"{promoted['bits_per_byte']:.4g} bits/byte ({name}{mark})"
        base = base_name(self.nodes)
        if "bits_per_byte" in (evaluated := summaries.get(f"evaluate.{base}", {})):
            return f"{evaluated['bits_per_byte']:.4g} bits/byte ({base}{_mark(evaluated)})"
        validated = summaries.get("pretrain", {}).get("validation_bits_per_byte")
        return None if validated is None else f"{validated:.4g} validation bits/byte"

    @property
    def ended(self) -> bool:
        """Whether it has done all there was to do."""
        return self.status in _CAME_TO_ITS_END

    @property
    def unfinished(self) -> bool:
        """Whether it stopped before its end, so that `ingot resume` has something to go on with."""
        return not self.ended and not self.at_work


class Runs:
    """The run records of one store.

    Args:
        store_root: root of the store.
    """

    def __init__(self, store_root: Path) -> None:
        self._store = open_store(store_root)
        self.root = self._store.root / "runs"

    def start(
        self,
        *,
        recipe: str,
        overrides: list[str],
        config: Mapping[str, Any],
        data_hash: str,
        nodes: dict[str, NodeRecord],
        settings: Mapping[str, Any] | None = None,
        selection: SelectionRecord | None = None,
        project: Path | None = None,
    ) -> RunRecord:
        """Create the record of a run that begins now, and hold its lock until `finish` or the end of this process."""
        now = dt.datetime.now(dt.UTC)
        wanted = f"{now:%Y%m%d-%H%M%S}-{Path(recipe).stem}"
        record = RunRecord(
            id=wanted,
            recipe=recipe,
            overrides=[redact_override(override) for override in overrides],
            settings=redact_value("", settings or {}),
            config=redact_value("", config),
            selection=selection or SelectionRecord(),
            project=None if project is None else str(project),
            data_hash=data_hash,
            started_at=now.isoformat(timespec="seconds"),
            process=this_process(),
            nodes=nodes,
        )
        for number in itertools.count(1):
            record.id = wanted if number == 1 else f"{wanted}-{number}"
            if (held := self._claimed(record)) is not None:
                record.folder = self.folder(record.id)
                _AT_WORK[record.folder] = held
                return record
        raise AssertionError

    def _claimed(self, record: RunRecord) -> contextlib.ExitStack | None:
        """Return the lock of a new run; None where another has its id: whoever writes the first record owns it."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._store.hold(_lock_of(record.id), what=f"run {record.id}", wait_s=0))
            except LockedError:
                return None
            with self._store.registering():  # from now on `ingot gc` leaves in place what it needs
                if self._store.create(f"runs/{record.id}/{RECORD}", record.model_dump_json(indent=1)):
                    return stack.pop_all()
        return None

    def save(self, record: RunRecord, *, wait: bool = True) -> None:
        """Write the record; a reader sees the old or the new one.

        Args:
            record: what to write.
            wait: return when others can see it; else soon after, where that takes a network.
        """
        record.folder = self.folder(record.id)
        self._store.write(f"runs/{record.id}/{RECORD}", record.model_dump_json(indent=1), wait=wait)

    def finish(self, record: RunRecord, status: str, exit_code: int, error: str | None = None) -> None:
        """Close the record."""
        record.status, record.exit_code = status, exit_code
        record.error = None if error is None else redact(error)
        record.finished_at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        try:
            self.save(record)
        except TransientError as fault:  # how the run itself ended is what counts
            console.say(f"the end of {record.id} is not on record: {fault.message}")
        if (held := _AT_WORK.pop(self.folder(record.id), None)) is not None:
            held.close()

    def folder(self, run_id: str) -> Path:
        """Return the folder of a run."""
        return self.root / run_id

    def all(self) -> list[RunRecord]:
        """Return every run, oldest first. A record that cannot be read is named on standard error and left out."""
        records = []
        for name, text in self._store.texts(f"runs/*/{RECORD}").items():
            try:
                records.append(self._parsed(name, text))
            except IntegrityError as error:
                _say_once(f"{error.message}; it is left out")
        return records

    def ids(self) -> list[str]:
        """Return the ids of all runs, oldest first."""
        return [Path(name).parent.name for name in self._store.texts(f"runs/*/{RECORD}")]

    def _parsed(self, name: str, text: str) -> RunRecord:
        try:
            record = RunRecord.model_validate(json.loads(text))
        except (ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0] if text.strip() else "it is empty, or closed to this user"
            run_id = Path(name).parent.name
            raise IntegrityError(
                f"the record {self._store.address}/{name} is damaged ({reason})",
                hint=f"`ingot delete {run_id}` removes it",
            ) from None
        record.folder = self._store.root / Path(name).parent
        return record

    def written_at(self, run_id: str) -> float | None:
        """Return when a record was last written, in seconds since 1970; None where there is none."""
        return self._store.modified(f"runs/{run_id}/{RECORD}")

    def publish(self, path: Path) -> None:
        """Have a text that lies in the folder of a run be seen wherever the store is."""
        name = path.relative_to(self._store.root).as_posix()
        if self._store.address != str(self._store.root):
            self._store.write(name, path.read_text(encoding="utf-8"))

    def unfinished(self) -> list[RunRecord]:
        """Return the runs to go on with, oldest first: none that a newer run of the very same nodes has replaced."""
        newest = {tuple(node.fingerprint for node in run.nodes.values()): run for run in self.all()}
        return [run for run in newest.values() if run.unfinished]

    def cut_off(self, recipe: str, overrides: list[str]) -> RunRecord | None:
        """Return the newest run of this very command, if it has not come to its end (it may be at work)."""
        shown = [redact_override(override) for override in overrides]
        same = [run for run in self.all() if run.recipe == recipe and run.overrides in (shown, run.pin(shown))]
        return same[-1] if same and same[-1].status not in _CAME_TO_ITS_END else None

    def last_of(self, recipe: str) -> dict[str, str]:
        """Return node -> fingerprint of what the newest runs of a recipe made, or found made."""
        made: dict[str, str] = {}
        for run in self.all()[::-1]:
            nodes = run.nodes.items() if run.recipe == recipe else ()
            made = {name: node.fingerprint for name, node in nodes if node.state in {"done", "cached"}} | made
        return made

    def remove(self, run_id: str) -> int:
        """Remove the record and the report of a run; return the bytes they took."""
        folder = self.folder(run_id)
        size = self._store.size_of(folder)
        self._store.discard(folder)
        return size

    def before(self, record: RunRecord, model: str, champions: Sequence[str]) -> dict[str, RunRecord]:
        """Return runs that trained another model than this one, by what they are to it.

        Args:
            record: this run.
            model: name of the registered model.
            champions: versions that have been champion, oldest first; this run's own may be the last.

        Returns:
            The run that made the champion before it, and the newest run before it, unless they are one.
        """
        others = [
            run
            for run in self.all()
            if run.started_at <= record.started_at and run.trained not in (None, record.trained)
        ]
        made = {run.promoted(model): run for run in others}
        version = next((version for version in reversed(champions) if version in made), None)
        named = {} if version is None else {f"champion v{version}": made[version]}
        if others and others[-1] not in named.values():
            named["last run"] = others[-1]
        return named

    def pareto(self, run_id: str) -> list[dict[str, Any]]:
        """Return the rows of a run's variants by method and bits, as its report shows them; empty without a report.

        Raises:
            IntegrityError: they are damaged.
        """
        text = self._store.read(f"runs/{run_id}/{PARETO}")
        try:
            rows: list[dict[str, Any]] = [] if text is None else json.loads(text)
            TypeAdapter(list[_Variant]).validate_python(rows)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise IntegrityError(
                f"{self._store.address}/runs/{run_id}/{PARETO} is damaged ({reason})",
                hint="delete it: the run is then shown without its variants",
            ) from None
        return rows

    def named(self, name: str) -> list[RunRecord]:
        """Return the run with this id; if there is none, those whose ids begin so."""
        runs = self.all()
        return [run for run in runs if run.id == name] or [run for run in runs if run.id.startswith(name)]

    def get(self, name: str | None = None) -> RunRecord:
        """Return the run with this id, or the only one whose id begins so; the newest when None.

        Raises:
            ConfigError: there is no such run, or more than one.
            IntegrityError: its record is damaged.
        """
        runs = self.all() if name is None else self.named(name)
        if name and [run.id for run in runs] != [name]:
            place = f"runs/{name}/{RECORD}"
            if (text := self._store.read(place)) is not None:
                return self._parsed(place, text)  # it is damaged; no other is meant by its whole id
        if not runs:
            raise ConfigError(
                "there is no run yet" if name is None else f"there is no run {name!r}",
                hint="`ingot list runs` shows them",
            )
        if name is not None and len(runs) > 1:
            raise ConfigError(f"{name!r} names {len(runs)} runs: {', '.join(run.id for run in runs[::-1])}")
        return runs[-1]


def _lock_of(run_id: str) -> str:
    """Return the lock that the process which executes a run holds until it ends, however it ends."""
    return f"runs/{run_id}/run"


def _mark(evaluated: Mapping[str, Any]) -> str:
    """Return what a number is marked with that was not measured on the whole test split."""
    return ", truncated" if evaluated.get("truncated") is True else ""


@functools.cache
def _say_once(text: str) -> None:
    """Print a line of news once in this process: a command reads the records several times."""
    console.say(text)


def _hidden(value: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted paths of settings whose values were removed because they are secret."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _hidden(child, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for position, child in enumerate(value):
            yield from _hidden(child, f"{path}.{position}")
    elif isinstance(value, str) and HIDDEN in value:
        yield path
