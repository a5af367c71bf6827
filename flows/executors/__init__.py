"""What carries stage requests out. The name of a module here is the value of `compute.executor`.

Each module has one class `Executor`, made from the `compute` section of the recipe. An executor knows requests, never
stages; to add one, add a file here and a test beside that of `local`.

A job is a process of `python -m pipelines.core.run_stage` somewhere: what it prints goes to `events.jsonl` in the
job's folder, which is followed here. A job may outlive the run that submitted it; the next run of the same plan adopts
it. What an executor says of a job is never taken for its result: that is the artifact in the store.
"""

from __future__ import annotations

import abc
import importlib
import json
import pkgutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pipelines.core import errors, stop
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import BY_EXIT_CODE, ConfigError, IngotError, Preempted, TransientError
from pipelines.core.request import StageRequest
from pipelines.core.stage import Progress
from pipelines.core.store import open_store

EVENTS = "events.jsonl"
"""What a job has printed, in its folder."""
_LOOK_S = 0.1


@dataclass(frozen=True, eq=False)
class Job:
    """A request that an executor has taken over."""

    id: str
    """What the executor calls it."""
    request: StageRequest
    folder: Path
    """Where its events are, and what else the executor keeps of it."""
    adopted: bool = False
    """Whether an earlier run submitted it."""


@dataclass(frozen=True)
class Status:
    """What is known of a job at this moment."""

    state: Literal["waits", "runs", "ends", "ended"]
    """`ends`: its process is gone, and the executor is still clearing up after it."""
    code: int | None = None
    """Exit code of a job that ended by itself; negative: the signal that killed it."""
    cause: IngotError | None = None
    """Why it ended where the stage itself could not say so: cancelled, out of memory, its machine was lost."""
    note: str = ""
    """For people: what it waits for, where it runs."""


class Executor(abc.ABC):
    """Carries requests out, up to `compute.parallel` at a time, each in a thread that waits for it.

    Args:
        compute: of the run.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    """Keys of `Resources` that have an effect."""
    one_machine: ClassVar[bool] = False
    """Whether everything works on this machine, so that what measures time must have the run for itself."""

    def __init__(self, compute: ComputeConfig) -> None:
        self._compute = compute
        self._jobs: list[Job] = []
        self._lock = threading.Lock()
        self._stopping = False

    @abc.abstractmethod
    def submit(self, request: StageRequest) -> Job:
        """Hand a request over and return at once.

        Raises:
            ConfigError: it can never run as it was asked for.
            TransientError: the scheduler does not answer.
        """

    @abc.abstractmethod
    def poll(self, job: Job) -> Status:
        """Return what is known of a job; cheap enough to be called ten times a second for each."""

    @abc.abstractmethod
    def cancel(self, jobs: Sequence[Job], grace_s: float) -> None:
        """Have jobs save and end, and return when nothing is left; what takes longer than `grace_s` is killed."""

    @abc.abstractmethod
    def logs(self, job: Job) -> str:
        """Return the end of what a job has written besides its events; empty where it wrote to this terminal."""

    @abc.abstractmethod
    def adopt(self, request: StageRequest) -> Job | None:
        """Return the job that an earlier run submitted for the same fingerprint and that has not ended, or None."""

    def described(self, request: StageRequest) -> str:
        """Return the job that `submit` would hand over, for people."""
        del request
        return "a process on this machine"

    def where(self, request: StageRequest) -> str:
        """Return where the stage would run, in a few words."""
        del request
        return "this machine"

    def problems(self, requests: Iterable[StageRequest]) -> Iterator[str]:
        """Yield what the scheduler has against jobs, as far as it can be asked beforehand."""
        del requests
        return iter(())

    def execute(self, request: StageRequest, report: Callable[[Progress], None]) -> Artifact:
        """Return the artifact of a request, passing on what the stage reports.

        Raises:
            IngotError: of the class that the stage raised, wherever it ran.
        """
        with self._lock, stop.held():  # a job that is submitted is known, whenever the stop comes
            if self._stopping:
                raise Preempted("the run was asked to stop", hint="the same command goes on where it stopped")
            job = self.adopt(request) or self.submit(request)
            self._jobs.append(job)
        done = False
        try:
            made = self._follow(job, report)
            done = True
            return made
        finally:
            self.release(job, done)
            with self._lock:
                self._jobs.remove(job)

    @abc.abstractmethod
    def release(self, job: Job, done: bool) -> None:
        """Forget a job that this run no longer waits for; `done` says that its artifact is there."""

    def stop(self) -> None:
        """Have everything at work save and end, and return when it has; what is asked later is refused."""
        with self._lock:
            self._stopping = True
            jobs = list(self._jobs)
        if jobs:
            self.cancel(jobs, self._compute.grace_s)

    def _follow(self, job: Job, report: Callable[[Progress], None]) -> Artifact:
        """Pass progress on until the job has ended, and return the artifact or raise its error as it was there."""
        events, last = _Events(job.folder / EVENTS), dict[str, Any]()
        note, pause = "", threading.Event()
        while True:
            status = self.poll(job)
            for event in events.new():
                last = event
                if event["event"] == "progress":
                    report(_progress(job.request.node, event))
            failed = last.get("event") == "error" and last["kind"] != Preempted.__name__  # that may be queued again
            if last.get("event") == "artifact" or status.state == "ended" or (failed and status.state == "ends"):
                return _result(job, status, last, self)
            if status.note != note and not last:
                note = status.note
                report(Progress(job.request.node, 0, 0, "", note))
            pause.wait(_LOOK_S)


@dataclass
class _Events:
    """The events of a job, as they are written; a line counts when it is whole."""

    path: Path
    _offset: int = 0
    _rest: bytes = field(default=b"")

    def new(self) -> list[dict[str, Any]]:
        """Return what came since the last call; opened anew each time, since a network file system shows no other."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._offset)
                text = stream.read()
        except FileNotFoundError:
            return []
        self._offset += len(text)
        *lines, self._rest = (self._rest + text).split(b"\n")
        return [json.loads(line) for line in lines if line.startswith(b"{")]


def _progress(node: str, event: Mapping[str, Any]) -> Progress:
    return Progress(node, **{name: value for name, value in event.items() if name != "event"})


def _result(job: Job, status: Status, last: Mapping[str, Any], executor: Executor) -> Artifact:
    node = job.request.node
    if last.get("event") == "artifact":
        return _stored(job, f"{node} was published, and is gone again")
    if status.cause is not None:
        raise status.cause
    if last.get("event") == "error":
        raise getattr(errors, last["kind"])(last["message"], hint=last["hint"])
    if status.code == 0:  # another run has followed it to its end, and tidied up
        return _stored(job, f"the process of {node} ended well, and its artifact is not there")
    code, tail = status.code, executor.logs(job)
    words = f"; the end of its log:\n{tail}" if tail else ""
    if code is not None and code < 0:
        raise TransientError(f"the process of {node} was killed by {signal.Signals(-code).name}{words}")
    raise BY_EXIT_CODE.get(code or 1, IngotError)(f"the process of {node} ended with exit code {code}{words}")


def _stored(job: Job, otherwise: str) -> Artifact:
    """Return the artifact of a job, or raise that it is not in the store."""
    stored = open_store(job.request.store).find(job.request.stage, job.request.fingerprint)
    if stored is None:
        raise IngotError(otherwise, hint="run the same command again")
    return stored


def names() -> list[str]:
    """Return the executors there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(compute: ComputeConfig) -> Executor:
    """Return the executor of a run.

    Raises:
        ConfigError: there is no such executor.
    """
    if compute.executor not in names():
        raise ConfigError(f"compute.executor is {compute.executor!r}; there is {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{compute.executor}")
    executor: Executor = module.Executor(compute)
    return executor
