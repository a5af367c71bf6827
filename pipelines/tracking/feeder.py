"""One background thread that talks to MLflow, so that nothing else ever waits for it.

A failure closes the door for a while (5 s, then longer): jobs that arrive meanwhile are dropped, which is no loss,
because the tracking record remembers everything and the last job of a run sends what is missing.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

log = logging.getLogger(__name__)

Job = Callable[[], None]
_WAITING_JOBS = 10_000
_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 60.0
_REST = 4.0
"""After the idle job its own duration so many times over: a slow MLflow is told curves less often, not all the time."""


_FIRST, _IN_TURN, _LAST = range(3)


class _Waiting(NamedTuple):
    """A job in the queue; sorted by its first two fields, which no two share."""

    rank: int
    number: int
    job: Job
    anyway: bool
    over: threading.Event


class Feeder:
    """A queue of jobs and the thread that does them in order.

    Args:
        idle: a job of its own, done whenever the queue was empty for `every_s`.
        every_s: seconds.
        describe: turns an exception into a line for the log (without secrets).
    """

    def __init__(self, idle: Job, *, every_s: float = 1.0, describe: Callable[[BaseException], str] = str) -> None:
        self._idle = idle
        self._every_s = every_s
        self._describe = describe
        self._jobs: queue.PriorityQueue[_Waiting] = queue.PriorityQueue(_WAITING_JOBS)
        self._numbers = itertools.count()
        self._closed_until = 0.0
        self._rests_until = 0.0
        self._pause_s = _PAUSE_S
        self.faults = 0
        """Jobs that failed or were dropped."""
        self.problem: str | None = None
        """What the last failure was; None when there was none."""
        self._thread = threading.Thread(target=self._work, name="mlflow-feeder", daemon=True)
        self._thread.start()

    def put(self, job: Job, *, anyway: bool = False, first: bool = False) -> threading.Event:
        """Queue a job and return at once.

        Args:
            job: what to do.
            anyway: try it even while the door is closed.
            first: before everything that waits, because somebody waits for this.

        Returns:
            An event that is set when the job was done, failed or dropped.
        """
        over = threading.Event()
        try:
            self._jobs.put_nowait(self._waiting(_FIRST if first else _IN_TURN, job, over, anyway=anyway))
        except queue.Full:
            self.faults += 1
            over.set()
        return over

    @property
    def open(self) -> bool:
        """Whether MLflow answered last time, or enough time passed to ask again."""
        return time.monotonic() >= self._closed_until

    def stop(self, timeout_s: float) -> None:
        """End the thread after the jobs it has; gives up waiting after `timeout_s`."""
        try:
            self._jobs.put(self._waiting(_LAST, self._idle, threading.Event()), timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _waiting(self, rank: int, job: Job, over: threading.Event, *, anyway: bool = False) -> _Waiting:
        return _Waiting(rank, next(self._numbers), job, anyway, over)

    def _work(self) -> None:
        while True:
            try:
                item = self._jobs.get(timeout=self._every_s)
            except queue.Empty:
                if (started := time.monotonic()) >= self._rests_until:
                    self._attempt(self._idle, anyway=False)
                    self._rests_until = time.monotonic() + _REST * (time.monotonic() - started)
                continue
            if item.rank == _LAST:
                return
            self._attempt(item.job, anyway=item.anyway)
            item.over.set()

    def _attempt(self, job: Job, *, anyway: bool) -> None:
        if not (self.open or anyway):
            self.faults += job is not self._idle
            return
        try:
            job()
        except Exception as error:  # noqa: BLE001 - tracking must never fail a stage, whatever MLflow raises
            self._fail(error)
            return
        self._closed_until, self._pause_s = 0.0, _PAUSE_S

    def _fail(self, error: BaseException) -> None:
        self.faults += 1
        self._closed_until = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        level = logging.DEBUG if self.problem else logging.WARNING
        self.problem = self._describe(error)
        log.log(level, "tracking pending: %s (`ingot sync` completes it later)", self.problem)
